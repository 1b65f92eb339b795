"""A tiny captured store to find concepts in."""

from dataclasses import replace

import torch
from torch import Tensor

from saint.steering.studio import Studio
from saint.store.activation_store import read_shard, shard_file
from saint.store.row_format import encode_rows
from tests.support.tiny_steering import D_MODEL, make_sae

TEXTS = [
    "Senior diplomats met to discuss the nuclear treaty",
    "the court ruling and the nuclear court",
    "diplomats met the court to discuss",
] * 6


class TinyStore:
    """What `StoredTokens` asks of a store: two shards of the tiny model's activations."""

    moved_to = None

    def __init__(self, root, studio):
        self.root, hook = root, studio.dictionaries[0].hook
        self.texts: list[tuple[list[int], Tensor]] = []
        for text in TEXTS:
            ids = studio.encode(text, chat=False)
            x = studio.model.capture(torch.tensor([ids]), [hook])[hook][0]
            self.texts.append((ids[1:], x[1:]))
        for shard, part in enumerate((self.texts[:7], self.texts[7:])):
            tokens = [ids for ids, _ in part]
            with shard_file(self.shard_path(shard), tokens, range(len(part)), d_model=D_MODEL) as f:
                rows = torch.cat([x for _, x in part])
                for name, tensor in encode_rows(rows, "bfloat16").items():
                    f.write(name, 0, tensor)

    n_shards = 2

    @property
    def n_tokens(self):
        return sum(len(ids) for ids, _ in self.texts)

    def shard_path(self, index):
        return self.root / f"shard_{index:05d}.safetensors"

    def read_index(self, index):
        shard = read_shard(self.shard_path(index))
        return {"token_ids": shard.token_ids, "offsets": shard.offsets}


def make_studio_of_other_sae(studio: Studio) -> Studio:
    """The same studio with another SAE."""
    dictionary = replace(studio.dictionaries[0], sae=make_sae(seed=9))
    return replace(studio, dictionaries=(dictionary,))
