"""`STUDIES`: every table, figure and observation of the paper, and what it left open, as grids and a claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imprint.studies import answers, parts
from imprint.studies.answers import Findings
from imprint.studies.claims import Answer
from imprint.studies.mechanism import mechanism
from imprint.studies.parts import Part
from imprint.studies.remedies import remedies
from imprint.studies.setting import Setting


@dataclass(frozen=True)
class Study:
    """A row of `STUDIES`.

    Attributes:
        title: what it repeats or asks.
        claim: what the paper says, or the open question.
        parts: the grids it needs, for a setting.
        answer: from the finished runs to tables and verdicts.
        block: the paper's figures that it repeats (`studies.paper`), if any.
    """

    title: str
    claim: str
    parts: Callable[[Setting], list[Part]]
    answer: Callable[[Findings], Answer]
    block: str = ""


STUDIES: dict[str, Study] = {
    "table2": Study(
        "Table 2: five methods, four attacks, three data sets",
        "Parameter-based methods reach AUCs far above .5, prompt-based methods do not.",
        parts.main,
        answers.table2,
        "table2",
    ),
    "table3": Study(
        "Table 3: LOSS AUC by model size",
        "With parameter-based methods the AUC grows with the model, with prompt-based methods it does not.",
        parts.family,
        answers.table3,
        "table3",
    ),
    "table4": Study(
        "Table 4: LoRA placement",
        "LoRA on projection layers memorizes more than on attention layers; on both, most.",
        parts.placement,
        answers.table4,
        "table4",
    ),
    "figure1": Study(
        "Figure 1: AUC over 15 epochs",
        "The AUC of parameter-based methods rises with every epoch; that of prompt-based methods hardly moves.",
        parts.main,
        answers.figure1,
        "figure1",
    ),
    "figure2": Study(
        "Figure 2: losses of members and non-members, before tuning, after LoRA and after prefix tuning",
        "LoRA pulls the losses of members and non-members apart; prefix tuning moves both alike.",
        parts.pair,
        answers.figure2,
        "figure2",
    ),
    "figure3": Study(
        "Figure 3: validation perplexity over 15 epochs",
        "Perplexity falls and then rises for parameter-based methods; for prompt-based methods it falls and settles.",
        parts.main,
        answers.figure3,
        "figure3",
    ),
    "observation1": Study(
        "Observation 1: parameter-based against prompt-based tuning",
        "Parameter-based tuning memorizes more than prompt-based tuning.",
        parts.main,
        answers.observation1,
        "table2",
    ),
    "observation2": Study(
        "Observation 2: memorization over the epochs",
        "It grows with the epochs for parameter-based tuning and stays low for prompt-based tuning.",
        parts.main,
        answers.observation2,
        "figure1",
    ),
    "observation3": Study(
        "Observation 3: memorization and model size",
        "It grows with model size for parameter-based tuning, hardly for prompt-based tuning.",
        parts.sizes,
        answers.observation3,
        "table3",
    ),
    "observation4": Study(
        "Observation 4: structured data",
        "Prompt-based tuning memorizes more on structured data than on other tasks.",
        parts.structured,
        answers.observation4,
        "table2",
    ),
    "mechanism": Study(
        "Mechanism: what a prefix does to attention, and whether members are moved differently",
        "A prefix biases attention instead of changing it, and so moves the losses of members and non-members alike.",
        parts.first,
        mechanism,
    ),
    "alignment": Study(
        "Alignment: the same checkpoints read rightly, and off by the number of virtual tokens",
        "How much AUC does misreading the outputs take from prompt tuning and P-tuning?",
        parts.misread,
        answers.alignment,
    ),
    "moe": Study(
        "Mixture of experts: dense and sparse at equal active parameters",
        "Do experts memorize more than attention, and a sparse model more than a dense one?",
        parts.experts,
        answers.moe,
    ),
    "data": Study(
        "Data: the size of the fine-tuning set, and how often a record occurs in it",
        "Memorization falls with more records and grows with the repetitions of one.",
        parts.amount,
        answers.data,
    ),
    "remedies": Study(
        "Remedies: ways of tuning that are said to leak less",
        "Which remedy lowers leakage most for the least utility?",
        parts.remedies,
        remedies,
    ),
}
