"""The advisor: given constraints and records, which of the methods to use, and on what evidence.

Arms are selected on validation; the test split stands beside it, for what one may expect.
"""

import math
from collections.abc import Sequence

from kdq.report.advisor import tables, words
from kdq.report.advisor.advice import Advice
from kdq.report.advisor.constraints import Constraints
from kdq.report.advisor.document import Document
from kdq.report.advisor.gaps import MOST_SEEDS
from kdq.report.advisor.rules import QUESTIONS, SEEDS
from kdq.report.advisor.study import studies
from kdq.report.workdirs import Workdir


def advise(sources: Sequence[Workdir], constraints: Constraints) -> Document:
    """Returns the report: an answer for each group of records that may be compared.

    Raises ConfigError for a least metric beyond 100 %.

    Args:
      sources: from `kdq.report.workdirs.read_evidence`.
      constraints: what has to hold.
    """
    compared = studies(sources)
    for study in compared:
        constraints.check(study.metric)
    advices = [Advice(study, constraints) for study in compared]
    return Document(
        "advice.txt",
        studies=advices,
        constraints=constraints,
        metric=advices[0].metric,
        tables=tables,
        words=words,
        questions=QUESTIONS,
        seeds=SEEDS,
        most_seeds=MOST_SEEDS,
        inf=math.inf,
    )
