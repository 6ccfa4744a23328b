"""The engine on a GPU: its C++ tests, then whole generations with a random T3 of the real shape in bf16.

Needs $VIVACE_EXECUTABLE (a built `vivace`); runs $VIVACE_TEST_ENGINE (the Catch2 program test_engine) with the models
in $VIVACE_TEST_MODELS/parity_{english,multilingual}, where they are given. Writes $OUT/engine-h200.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vivace.bench.process import nvidia_libraries

TEXT = "Hello! This is vivace, turning text into speech tokens."
OUT = Path(os.environ.get("OUT") or Path(__file__).resolve().parents[1] / "docs/results")


def library_path(executable):
    """The host's library, torch's own, and the CUDA packages that pip put beside it."""
    folder = Path(torch.__file__).parent
    own = [str(Path(executable).resolve().parents[1] / "lib"), str(folder / "lib")]
    return os.pathsep.join([*own, *nvidia_libraries(folder.parent)])


def main():
    executable = os.environ["VIVACE_EXECUTABLE"]
    environment = {**os.environ, "LD_LIBRARY_PATH": library_path(executable)}
    failed = False
    if program := os.environ.get("VIVACE_TEST_ENGINE"):
        models = os.environ["VIVACE_TEST_MODELS"]
        for variant in ("english", "multilingual"):
            if (Path(models) / f"parity_{variant}").is_dir():
                environment[f"VIVACE_TEST_MODEL_{variant}"] = f"{models}/parity_{variant}"
        failed = subprocess.run([program, "[gpu]"], env=environment).returncode != 0

    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/t3.vivace"
        export = ["export", "--random", "--seed", "7", "--dtype", "bf16", "-o", model, "--assets", directory, "-q"]
        subprocess.run([sys.executable, "-W", "ignore", "-m", "vivace", *export], check=True)
        generate = [executable, "generate", "--model", model, "--tokenizer", f"{directory}/tokenizer.json"]
        generate += ["--voice", f"{directory}/voice.safetensors", "--seed", "7", "--json"]

        def run(requests, *options, **variables):
            text = "\n".join([TEXT] * requests)
            command = [
                *generate,
                "--lines",
                "--batch",
                str(requests),
                "--max-tokens",
                "1000",
                "--ignore-stop",
                *options,
            ]
            done = subprocess.run(
                command, input=text, env={**environment, **variables}, check=True, capture_output=True, text=True
            )
            return json.loads(done.stdout)

        rows = []
        print(
            f"{'requests':>8} {'cfg':>4} {'graphs':>6} {'fused':>6} {'tokens/s':>9} {'x real time':>11} "
            f"{'ms a step':>9} {'first ms':>8} {'load s':>6} {'GB':>6} {'limit':>6}"
        )
        tokens = {}
        cases = ((1, 0.5, 1, 1), (1, 0.5, 0, 1), (1, 0.5, 1, 0), (1, 0.0, 1, 1), (20, 0.5, 1, 1), (64, 0.5, 1, 1))
        for requests, cfg, graphs, fused in cases:
            variables = {"VIVACE_CUDA_GRAPHS": str(graphs), "VIVACE_FUSED_STEP": str(fused)}
            result = run(requests, "--cfg-weight", str(cfg), "--repeat", "2", **variables)
            stats, last = result["stats"], result["runs"][-1]
            tokens[requests, cfg, graphs, fused] = [request["tokens"] for request in result["results"]]
            first = max(last["time_to_first_token"])
            ms = 1000 * (last["seconds"] - first) / 999
            rate = last["tokens"] / last["seconds"]
            # In use on the whole device, the context and the driver included, against 1.1 (weights + KV) + 0.6 GB.
            used = stats["device_memory_bytes"] / 1e9
            limit = 1.1 * (stats["weight_bytes"] + stats["cache_bytes"]) / 1e9 + 0.6
            row = {"requests": requests, "cfg_weight": cfg, "cuda_graphs": bool(graphs), "tokens_per_second": rate}
            row |= {"fused": bool(stats["fused_steps"]), "ms_per_step": ms, "first_token_ms": 1000 * first}
            rows.append({**row, "stats": stats})
            load = stats["load_seconds"] + stats["warm_up_seconds"]
            print(
                f"{requests:8} {cfg:4} {graphs:6} {stats['fused_steps'] > 0!s:>6} {rate:9.0f} {rate / 25:11.1f} "
                f"{ms:9.3f} {1000 * first:8.2f} {load:6.2f} {used:6.2f} {limit:6.2f}",
                flush=True,
            )
        same = tokens[1, 0.5, 1, 1] == tokens[1, 0.5, 0, 1]
        print(f"tokens with CUDA graphs equal those without: {same}")
        failed = failed or not same
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "engine-h200.json", "w", encoding="utf-8") as file:
        json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
