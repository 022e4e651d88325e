"""Counts what the style of kdq rules out, and names each place; status 1 if there is any.

    python .ci/words.py [FOLDER or FILE ...]

A name says what it holds, a function is a verb, a docstring begins with what it does: see
CONTRIBUTING.md. Without a path it looks at kdq, launch, configs and benchmarks.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PLACEHOLDERS = {"found", "own", "one", "given", "told", "wanted", "beside"}
NO_VERBS = {"of", "begin", "blame", "to_the_end"}
NO_START = re.compile(r"(What|Whether|Of|Whose|Who|How|That)\b")
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 50, 7
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main(arguments: list[str]) -> int:
    """Prints each place and a count of each kind."""
    roots = [Path(name) for name in arguments or ("kdq", "launch", "configs", "benchmarks")]
    files = [
        f for root in roots for f in ([root] if root.is_file() else sorted(root.rglob("*.py")))
    ]
    places = [place for file in files for place in check(file)]
    for kind, where in sorted(places):
        print(f"{where}: {kind}")
    kinds = sorted({kind.split(":")[0] for kind, _ in places})
    for kind in kinds:
        print(sum(name.split(":")[0] == kind for name, _ in places), kind)
    return bool(places)


def check(file: Path) -> Iterator[tuple[str, str]]:
    """Yields `(kind, where)` of each place in a file."""
    text = file.read_text()
    if (lines := len(text.splitlines())) > LONGEST_FILE:
        yield f"file over {LONGEST_FILE} lines: {lines}", str(file)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, Function):
            yield from ((kind, where) for kind in check_function(node))
        if isinstance(node, Function | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node) or ""
            if NO_START.match(docstring):
                yield f"docstring that begins with no verb or noun: {docstring[:40]!r}", where
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.startswith("jax._src") for name in names):
                yield "import of jax._src", where


def check_function(node: Function) -> Iterator[str]:
    """Yields what a function's name, length, parameters and locals are against."""
    if node.name.strip("_") in NO_VERBS or node.name.strip("_").startswith("of_"):
        yield f"function without a verb: {node.name}"
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if body and (lines := node.end_lineno - body[0].lineno + 1) > LONGEST_FUNCTION:
        yield f"function over {LONGEST_FUNCTION} lines: {node.name} {lines}"
    positional = [*node.args.posonlyargs, *node.args.args]
    keywords = list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    names = [argument.arg for argument in (*positional, *node.args.kwonlyargs)]
    # Keywords with a default are options, which a public function may have many of.
    counted = [argument.arg for argument in positional if argument.arg not in ("self", "cls")]
    counted += [argument.arg for argument, default in keywords if default is None]
    if len(counted) > MOST_PARAMETERS:
        yield f"function with over {MOST_PARAMETERS} parameters: {node.name} {len(counted)}"
    stores = (
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    )
    for name in sorted({*names, *stores} & PLACEHOLDERS):
        yield f"placeholder for a name: {name} in {node.name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
