"""Sec. 5.2.1: does classifier guidance help likelihood maximisation, too?"""

from coup_lib.defences import LABELS, MAXIMISERS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import CLEAN, AttackSpec
from coup_lib.reporting import paper, tables
from coup_lib.reporting.tables import PerImage

PLAIN, GUIDED = MAXIMISERS
WAYS = {
    "bpda": "APGD-ce, the identity as gradient",
    "adaptive": "APGD-ce, exact gradient",
    "recorded": tables.COLUMNS["recorded"],
}


def attacks() -> dict[str, dict[str, AttackSpec]]:
    """Defence → column → attack: APGD-ce by the identity, as published, by the exact gradient, and moved."""
    return {
        defence: {
            "clean": CLEAN,
            "bpda": against("apgd-ce", defence, "bpda"),
            "adaptive": against("apgd-ce", defence),
            "from_none": against("apgd-ce", "none"),
            "from_reverse": against("apgd-ce", "reverse"),
        }
        for defence in MAXIMISERS
    }


def measure(config: Config) -> PerImage:
    """Defence → column → share of right draws (n,), the worst case on record among them."""
    return tables.measured(Evaluation(config), attacks())


def claims(results: PerImage) -> str:
    """Markdown: what guidance adds, and on which of the two the exact gradient is the weaker attack."""
    reported = paper.LIKELIHOOD[GUIDED].robustness - paper.LIKELIHOOD[PLAIN].robustness
    claim = f"Guidance makes likelihood maximisation more robust (the paper reports {reported:+.2f})"
    rows = {LABELS[name]: row for name, row in results.items()}
    weaker = "the exact gradient is the weaker attack"
    masked = tables.attack_claims(rows, weaker, "adaptive", "bpda", "Exact gradient − identity")
    guided = tables.claims({claim: (results[GUIDED], results[PLAIN])}, WAYS)
    return f"{guided}\n\n{masked}"
