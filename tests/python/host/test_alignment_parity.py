"""The C++ alignment analyzer against Chatterbox's, on random attention. The C++ side is tests/host/align_lines.cpp."""

import json
import logging
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from programs import built

pytestmark = pytest.mark.chatterbox
STOP = 3
EDIT = 2.0**15


def decision(logits):
    if (logits == torch.tensor([-EDIT, -EDIT, -EDIT, EDIT, -EDIT])).all():
        return "force"
    return "suppress" if logits[0, STOP] == -EDIT else "none"


def chatterbox_decisions(text_length, steps):
    from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

    hooks = SimpleNamespace(self_attn=SimpleNamespace(register_forward_hook=lambda hook: None))
    transformer = SimpleNamespace(layers=[hooks] * 14)
    analyzer = AlignmentStreamAnalyzer(transformer, None, text_tokens_slice=(2, 2 + text_length), eos_idx=STOP)
    decisions, positions = [], []
    for step, (rows, last_token) in enumerate(steps):
        frames = rows.shape[0]
        # Whole attention maps around our rows: (queries, keys), the text in columns 2 ...
        attention = torch.zeros(frames if step else 2 + text_length + frames, 2 + text_length + frames)
        attention[-frames:, 2 : 2 + text_length] = rows
        analyzer.last_aligned_attns = [attention] * 3
        decisions.append(decision(analyzer.step(torch.zeros(1, 5), next_token=last_token)))
        positions.append(int(analyzer.text_position))
    return decisions, positions


def random_steps(text_length, count):
    """A reader that mostly walks on, and now and then stays, jumps, goes back or repeats a token."""
    steps, position, token = [], 0.0, 6561
    for step in range(count):
        rows = 0.02 * torch.rand(2 if step == 0 else 1, text_length)
        if torch.rand(()) < 0.03:
            position = float(torch.randint(0, text_length, ()))
        rows[:, min(int(position), text_length - 1)] += 0.3 + 0.6 * torch.rand(())
        position = min(position + 0.9 * float(torch.rand(())), text_length - 1.0)
        steps.append((rows, token))
        if torch.rand(()) > 0.02:
            token = int(torch.randint(0, 6561, ()))
    return steps


def test_decisions_and_positions_are_chatterboxes():
    tool = os.environ.get("VIVACE_ALIGN_LINES") or built("align_lines")
    if tool is None:
        pytest.skip("align_lines is not built (VIVACE_BUILD_TESTS=ON)")
    logging.getLogger("chatterbox.models.t3.inference.alignment_stream_analyzer").setLevel(logging.ERROR)
    cases = [(length, random_steps(length, 60)) for length in torch.randint(6, 40, (60,)).tolist()]
    lines = "".join(
        json.dumps(
            {
                "text_length": length,
                "steps": [{"rows": rows.flatten().tolist(), "last_token": token} for rows, token in steps],
            }
        )
        + "\n"
        for length, steps in cases
    )
    done = subprocess.run([str(tool)], input=lines, capture_output=True, text=True, check=True)
    seen = set()
    for (length, steps), line in zip(cases, done.stdout.splitlines(), strict=True):
        ours = json.loads(line)
        assert (ours["decisions"], ours["positions"]) == chatterbox_decisions(length, steps)
        seen.update(ours["decisions"])
    assert seen == {"none", "suppress", "force"}
