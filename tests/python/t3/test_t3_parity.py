"""vivace's T3 and Chatterbox's, with the same weights."""

import dataclasses

import pytest
import torch
from generation import Options, generate
from safetensors.torch import load_file

from vivace import t3 as vivace_t3

pytestmark = pytest.mark.chatterbox

#: float32 sums in another order, over some layers
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=["english", "multilingual"])
def parity(request, tmp_path_factory):
    """The fixture files of one variant: folder, exported model, voice, expected.json."""
    from make_parity import make_parity

    folder = tmp_path_factory.mktemp(request.param)
    expected = make_parity(folder, request.param)
    return folder, vivace_t3.load(folder / "t3.vivace"), load_file(folder / "voice.safetensors"), expected


@pytest.fixture(scope="module")
def chatterbox(parity):
    """Chatterbox's model of the fixture."""
    from chatterbox_t3 import build_t3

    return build_t3(vivace_t3.preset("tiny", parity[3]["variant"]), seed=0)


class ChatterboxAnalyzer:
    """Chatterbox's AlignmentStreamAnalyzer on probed attention rows instead of its hooks on eager attention."""

    def __init__(self, text_start: int, text_tokens: int, stop_token: int):
        from chatterbox_t3 import AlignmentStreamAnalyzer

        class Probed(AlignmentStreamAnalyzer):
            def _add_attention_spy(self, tfmr, buffer_idx, layer_idx, head_idx):
                pass

        self.text_end = text_start + text_tokens
        self.analyzer = Probed(None, None, text_tokens_slice=(text_start, self.text_end), eos_idx=stop_token)

    def __call__(self, logits, probes, tokens):
        rows = probes[:, 0]  # (heads, probe_rows, capacity)
        if self.analyzer.curr_frame_pos == 0:
            # It slices the rows after the text, the two BOS, out of a square matrix.
            rows = torch.cat([torch.zeros(rows.size(0), self.text_end, rows.size(2)), rows], dim=1)
        self.analyzer.last_aligned_attns = list(rows)
        return self.analyzer.step(logits, next_token=tokens[-1])


def test_speech_tokens_are_those_of_chatterbox(parity):
    _, model, voice, expected = parity
    fields = {field.name for field in dataclasses.fields(Options)}
    stopped = 0
    for case in expected["cases"]:
        options = Options(**{name: value for name, value in case.items() if name in fields})
        watch = None
        if model.manifest["alignment_heads"]:
            start = model.manifest["conditioning"]["length"]
            watch = ChatterboxAnalyzer(start, len(expected["text_tokens"]), expected["stop_token"])
        tokens = generate(model, voice, expected["text_tokens"], options, watch)
        stops = case["finish_reason"] == "stop"
        stopped += stops
        assert tokens == case["tokens"] + [expected["stop_token"]] * stops, case["name"]
    assert 0 < stopped < len(expected["cases"]), "the fixture no longer has both ways to finish"


@torch.inference_mode()
def test_conditioning_and_prompt_embeddings_are_those_of_chatterbox(parity, chatterbox):
    from chatterbox_t3 import conditionals

    _, model, voice, expected = parity
    text = torch.tensor(expected["text_tokens"])
    for exaggeration in (0.25, 0.9):
        theirs = chatterbox.prepare_conditioning(conditionals(voice, exaggeration))[0]
        cond = model.encode_voice(voice["t3.speaker_emb"], voice["t3.cond_prompt_speech_tokens"], exaggeration)
        torch.testing.assert_close(cond, theirs, **TOLERANCE)
        embeds, cond_length = chatterbox.prepare_input_embeds(
            t3_cond=conditionals(voice, exaggeration),
            text_tokens=text.expand(2, -1),
            speech_tokens=torch.full((2, 1), expected["start_token"]),
            cfg_weight=0.5,
        )
        assert cond_length == model.manifest["conditioning"]["length"] == cond.size(0)
        for row, drop_text in enumerate((False, True)):
            ours = model.embed_prompt(cond, text, drop_text)
            # prepare_input_embeds has one BOS; T3.inference appends the same once more.
            torch.testing.assert_close(ours[:-1], embeds[row], **TOLERANCE)
            torch.testing.assert_close(ours[-1], ours[-2], rtol=0, atol=0)


@torch.inference_mode()
def test_every_layer_is_that_of_transformers_llama(parity, chatterbox):
    folder, _, _, _ = parity
    weights = vivace_t3.open_weights(folder / "t3.safetensors")
    model = vivace_t3.load_model(weights, vivace_t3.checkpoint_config(weights), torch.float32)
    llama = chatterbox.tfmr
    lengths = [21, 9, 1]
    total = sum(lengths)
    x = torch.randn(total, llama.config.hidden_size, generator=torch.Generator().manual_seed(5))
    k_cache, v_cache = model.new_cache(len(lengths), 32)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    streams = []  # the residual stream before each layer and before the final norm
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0] + inputs[1]))
        for layer in model.backbone.layers
    ]
    rows = torch.arange(3, dtype=torch.int32)
    hidden = model(x, k_cache, v_cache, torch.zeros(3, dtype=torch.int32), rows, starts, max(lengths), None)
    for handle in handles:
        handle.remove()

    for row, length in enumerate(lengths):
        span = slice(int(starts[row]), int(starts[row]) + length)
        outputs = llama(inputs_embeds=x[None, span], output_hidden_states=True, use_cache=True)
        # transformers gives the input of each layer, and after the last the normalised output.
        for layer, theirs in enumerate(outputs.hidden_states[:-1]):
            torch.testing.assert_close(streams[layer][span], theirs[0], **TOLERANCE, msg=f"layer {layer}, row {row}")
        torch.testing.assert_close(hidden[span], outputs.last_hidden_state[0], **TOLERANCE)
        for layer in range(model.num_layers):
            keys = outputs.past_key_values.layers[layer].keys[0].transpose(0, 1)
            values = outputs.past_key_values.layers[layer].values[0].transpose(0, 1)
            torch.testing.assert_close(k_cache[layer, row, :length], keys, **TOLERANCE)
            torch.testing.assert_close(v_cache[layer, row, :length], values, **TOLERANCE)


@torch.inference_mode()
def test_probes_are_rows_of_eager_attention(parity, chatterbox):
    _, model, _, _ = parity
    heads = model.manifest["alignment_heads"]
    if not heads:
        pytest.skip("the English model has no alignment heads")
    llama = chatterbox.tfmr
    length, capacity = 17, 24
    x = torch.randn(2, length + 1, llama.config.hidden_size, generator=torch.Generator().manual_seed(6))
    saved = llama.config._attn_implementation
    llama.config._attn_implementation = "eager"
    try:
        attentions = llama(inputs_embeds=x, output_attentions=True).attentions
    finally:
        llama.config._attn_implementation = saved
    expected = torch.stack([attentions[layer][:, head] for layer, head in heads])  # (heads, rows, queries, keys)

    k_cache, v_cache = model.new_cache(2, capacity)
    rows = torch.arange(2, dtype=torch.int32)
    starts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    probes = torch.full((len(heads), 2, 2, capacity), -1.0)
    prompt = x[:, :length].reshape(2 * length, -1)
    model(prompt, k_cache, v_cache, torch.zeros(2, dtype=torch.int32), rows, starts, length, probes)
    torch.testing.assert_close(probes[..., :length], expected[:, :, length - 2 : length, :length], **TOLERANCE)
    assert probes[..., length:].count_nonzero() == 0
    probes = torch.full((len(heads), 2, 1, capacity), -1.0)
    lengths = torch.full((2,), length, dtype=torch.int32)
    model(x[:, length], k_cache, v_cache, lengths, rows, None, 0, probes)
    torch.testing.assert_close(probes[..., : length + 1], expected[:, :, length:, : length + 1], **TOLERANCE)
    assert probes[..., length + 1 :].count_nonzero() == 0


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "text_vocab_size"), [(4, 2, 32, 2352), (6, 1, 16, 704)]
)
@torch.inference_mode()
def test_logits_are_those_of_chatterbox_at_other_shapes(tmp_path, num_heads, num_kv_heads, head_dim, text_vocab_size):
    from chatterbox_t3 import build_t3, conditionals
    from safetensors.torch import save_file

    config = vivace_t3.T3Config(
        hidden_size=96,
        intermediate_size=160,
        num_layers=3,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        text_vocab_size=text_vocab_size,
        perceiver_queries=8,
        perceiver_heads=4,
    )
    theirs = build_t3(config, seed=3)
    save_file(theirs.state_dict(), tmp_path / "t3.safetensors")
    vivace_t3.export(tmp_path / "t3.vivace", tmp_path / "t3.safetensors", dtype="fp32", head_dim=head_dim)
    model = vivace_t3.load(tmp_path / "t3.vivace")
    assert model.manifest["variant"] == ("english" if text_vocab_size == 704 else "multilingual")
    voice = vivace_t3.write_random_voice(tmp_path / "voice.safetensors", seed=4, prompt_tokens=31)
    text = torch.tensor([255, 17, 99, 4, 0])
    speech = torch.tensor([6561, 12, 700, 6000])
    out = theirs(
        t3_cond=conditionals(voice, 0.5),
        text_tokens=text[None],
        text_token_lens=torch.tensor([5]),
        speech_tokens=speech[None],
        speech_token_lens=torch.tensor([4]),
    )
    # T3.forward has one BOS and speech positions from 0.
    cond = model.encode_voice(voice["t3.speaker_emb"], voice["t3.cond_prompt_speech_tokens"], 0.5)
    prompt = model.embed_prompt(cond, text, False)[:-1]
    k_cache, v_cache = model.new_cache(1, 64)
    length = prompt.size(0)
    row = torch.zeros(1, dtype=torch.int32)
    hidden = model(prompt, k_cache, v_cache, row, row, torch.tensor([0, length], dtype=torch.int32), length, None)
    logits = [model.logits(hidden[-1:])]
    for step in range(1, 4):
        lengths = torch.tensor([length + step - 1], dtype=torch.int32)
        position, request = torch.tensor([step]), torch.zeros(1, dtype=torch.int64)
        logits.append(model.decode(speech[step : step + 1], position, request, k_cache, v_cache, lengths, row, None))
    torch.testing.assert_close(torch.cat(logits), out.speech_logits[0], **TOLERANCE)


def test_random_weights_have_the_spread_of_chatterboxes(chatterbox):
    from chatterbox_t3 import ChatterboxConfig, chatterbox_t3

    from vivace.bench.chatterbox import sized

    config = vivace_t3.preset("tiny", "english" if chatterbox.hp.text_tokens_dict_size == 704 else "multilingual")
    torch.manual_seed(0)
    with sized(chatterbox_t3, config):
        theirs = chatterbox_t3.T3(ChatterboxConfig(config.text_vocab_size)).state_dict()
    ours = vivace_t3.RandomWeights(config, seed=1)
    assert set(theirs) - set(ours.shapes) == {"tfmr.embed_tokens.weight", "text_head.weight"}
    for name, shape in ours.shapes.items():
        tensor = ours.read(name)
        assert tensor.shape == theirs[name].shape == torch.Size(shape), name
        if tensor.numel() >= 4096:
            # The standard deviation of n samples is within about 1 / sqrt(2 n); 4096 samples, five times that.
            assert float(tensor.std()) == pytest.approx(float(theirs[name].std()), rel=0.08), name
            assert tensor.abs().max() < 1.6 * theirs[name].abs().max(), name
