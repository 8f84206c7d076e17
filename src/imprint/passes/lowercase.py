"""Each record once more in lower case (Carlini et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from imprint.passes.texts import check_texts, scored_texts, variants, with_texts

if TYPE_CHECKING:
    from imprint.passes.bench import Bench


def measure(bench: Bench) -> pa.Table:
    """TokenStats of the records whose scored texts are in lower case; a prompt that is not scored stays as it is.

    Encoded by the rules of the records themselves, so that another number of tokens may be scored.

    Raises:
        DataError: records come in tokens; or an evaluated one has nothing to predict once it is in lower case (`!A` may
            be two tokens and `!a` one).
    """
    from imprint.data.tokens import unusable
    from imprint.passes.bench import blanked, check_complete, kept_table

    audit, loss = bench.audit, bench.encoder.loss
    check_texts(audit.examples, "the attack `lowercase` needs texts; leave it out of `attacks`")
    encoder = variants(bench.encoder)
    lower = [encoder(with_texts(e, [t.lower() for t in scored_texts(e, loss)], loss)) for e in audit.examples]
    lacking = [unusable(record) is not None for record in lower]
    check_complete(audit, lacking, "have nothing to predict once they are in lower case")
    texts = [own if gone else low for own, low, gone in zip(audit.scored, lower, lacking, strict=True)]
    return kept_table(audit, blanked(bench.stats(texts), lacking))
