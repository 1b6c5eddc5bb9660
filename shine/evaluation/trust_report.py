"""The trust report of a checkpoint: what it is examined on, and the page that comes of it (``shine trust``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shine.checkpoint import output_folder
from shine.config import SourceConfig
from shine.data.sources import read_source
from shine.data.tally import Tally
from shine.data.worlds import World
from shine.evaluation import qa, trust
from shine.evaluation.methods import Shine
from shine.evaluation.run import weights_digest
from shine.evaluation.side_by_side import three_methods
from shine.evaluation.trust_page import write_page
from shine.model import Shine as Model


def report_trust(
    checkpoint: str,
    output: Path,
    *,
    backbone: str | None,
    allow_variant: bool,
    contexts: int,
    sources: Mapping[str, str],
    knowledge: Path | None,
    worlds: bool,
    max_new_tokens: int,
    seed: int,
) -> Path:
    """Examine a checkpoint on invented worlds and on sources (kind to path), write the page and return it.

    Raises:
        ValueError: nothing to examine it on, too few contexts, or no such checkpoint.
    """
    folder = output_folder(output)
    if contexts < 2 or not (worlds or sources):
        raise ValueError("contexts must be at least 2, and there must be worlds or a source: how adapters differ is asked of pairs")
    facts = () if knowledge is None else trust.read_knowledge(knowledge)
    model = Model.from_pretrained(checkpoint, backbone=backbone, allow_variant=allow_variant)
    # Now: what lies there when all is examined may be another.
    weights = weights_digest(checkpoint, [])
    sets = [trust.world_set(list(World(seed=seed).examples(contexts)), seed=seed)] if worlds else []
    sets += [_passages(model, kind, path, contexts=contexts) for kind, path in sources.items()]
    # Before any of them is examined, which takes long.
    for questions in sets:
        if len(questions.examples) < 2 or not trust.fills_conversations(questions.examples):
            raise ValueError(
                f"{questions.name}: {len(questions.examples)} contexts hold too few questions for conversations of {trust.TURNS} "
                "turns: give more, or look at more contexts with --contexts"
            )
    methods = three_methods(model)
    assert isinstance(methods[0], Shine)
    asker = trust.Asker.of(methods[0].speaker, methods[0], max_new_tokens=max_new_tokens)
    found = []
    for questions in sets:
        print(f"{questions.name}: {len(questions.examples)} contexts", flush=True)
        found.append(trust.examine(asker, replace(questions, knowledge=facts), seed=seed))
    about = f"Hypernetwork `{checkpoint}`, backbone `{model.config.path}`; answers of at most {max_new_tokens} tokens, seed {seed}."
    return write_page(folder, found, about=about, weights=weights)


def _passages(model: Model, kind: str, path: str, *, contexts: int) -> trust.TrustSet:
    """The first ``contexts`` of a source, cut to what the model reads at once; what was cut or skipped is said."""
    source = SourceConfig(kind=kind, path=path, split="validation" if kind == "squad" else "train")
    tally = Tally()
    usable = qa.usable_examples(
        read_source(source), model.tokenizer, context_length=model.context_length, questions=True, tally=tally
    )
    found = [example for _, example in zip(range(contexts), usable, strict=False)]
    print(f"{path}: {tally}", flush=True)
    return trust.passage_set(found, name="SQuAD" if kind == "squad" else Path(path).name)
