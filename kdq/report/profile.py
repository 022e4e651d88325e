"""A profile on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from kdq.experiment import Profile


def print_profile(profile: Profile, top: int, console: Console | None = None) -> None:
    """Prints the time of a step, and its dearest operations."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title="Dearest operations")
    table.add_column("Operation")
    for name in ("ms a step", "Share %"):
        table.add_column(name, justify="right")
    whole = sum(profile.costs.values())
    for name, ms in list(profile.costs.items())[:top]:
        table.add_row(name, f"{ms:.3f}", f"{100 * ms / whole:.1f}")
    console.print(table)
    console.print(
        f"{profile.step:.3f} ms a step of the loop, {100 * profile.outside:.1f}% of it outside the "
        f"compiled step. Trace: {profile.trace}",
        soft_wrap=True,
    )
