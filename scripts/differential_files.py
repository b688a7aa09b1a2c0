"""Mutations of the shards and of the index."""

from random import Random

from differential_draft import Draft, Files, Unfit, mutation, pick


@mutation("several shards", good=True, weight=2)
def _shards(draft: Draft, random: Random) -> str:
    draft.cuts = random.choice((2, 3, 5))
    return str(draft.cuts)


@mutation("one shard and no index", good=True)
def _no_index(draft: Draft, _: Random) -> None:
    if draft.cuts > 1:
        raise Unfit

    def edit(files: Files) -> None:
        files.index = None

    draft.edits.append(edit)


@mutation("several shards and no index")
def _lost_index(draft: Draft, _: Random) -> None:
    draft.cuts = 3

    def edit(files: Files) -> None:
        files.index = None

    draft.edits.append(edit)


@mutation("the index lacks a tensor")
def _unindexed(draft: Draft, random: Random) -> str:
    name = pick(random, draft.tensors)

    def edit(files: Files) -> None:
        if files.index:
            files.index.pop(name, None)

    draft.edits.append(edit)
    return name


@mutation("the index names a tensor that no shard has")
def _phantom(draft: Draft, random: Random) -> str:
    name = pick(random, ("model.layers.0.note.weight", "lm_head.bias"))

    def edit(files: Files) -> None:
        if files.index is not None:
            files.index[name] = next(iter(files.shards))

    draft.edits.append(edit)
    return name


@mutation("a tensor is in two shards")
def _twice(draft: Draft, random: Random) -> str:
    draft.cuts = max(draft.cuts, 2)
    name = pick(random, draft.tensors)

    def edit(files: Files) -> None:
        for names in files.shards.values():
            if name not in names:
                names.append(name)
                return

    draft.edits.append(edit)
    return name


@mutation("a shard is missing")
def _lost_shard(draft: Draft, random: Random) -> str:
    draft.cuts = max(draft.cuts, 3)
    number = random.randrange(draft.cuts)

    def edit(files: Files) -> None:
        files.lost.add(list(files.shards)[number])

    draft.edits.append(edit)
    return str(number + 1)


@mutation("a shard that the index does not name")
def _stale_shard(draft: Draft, random: Random) -> str:
    names = random.sample(sorted(draft.tensors), 3)
    file = pick(
        random, ("model-00009-of-00009.safetensors", "consolidated.safetensors", "old.safetensors")
    )

    def edit(files: Files) -> None:
        files.shards[file] = [name for name in names if name in draft.tensors]

    draft.edits.append(edit)
    return f"{file}: {names[0]}"
