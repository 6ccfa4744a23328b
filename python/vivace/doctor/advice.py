"""From what was found to a status and to what to type."""

from typing import Any

from vivace.doctor.attempt import failed

#: Exit status of `vivace doctor`, worst first in case of several.
OK, NO_GPU, BROKEN, NOT_OURS = 0, 3, 4, 5
MEANING = {
    OK: "everything that was looked at runs on vivace's kernels",
    NO_GPU: "vivace works, but there is no GPU that it has kernels for: sdpa and vivace's CPU operators are used",
    BROKEN: "vivace's operators do not load, or compute wrongly",
    NOT_OURS: "the model that was asked about cannot be read, or does not run on vivace's kernels as it is",
}

_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps . in vivace's source"


def status(report: dict[str, Any]) -> int:
    operators = report["operators"]
    if not operators.get("loaded") or not operators.get("self_test", {}).get("ok", True):
        return BROKEN
    if not report.get("trial", {}).get("ok", True):
        return BROKEN
    model = report.get("model")
    if model is not None and ("error" in model or any(x["implementation"] != "vivace" for x in model["layers"])):
        return NOT_OURS
    return OK if report["gpu"]["usable"] else NO_GPU


def advice(report: dict[str, Any]) -> list[str]:
    """What to type, most urgent first."""
    lines = []
    packages, operators = report["packages"], report["operators"]
    torch = packages.get("torch", {}) if not failed(packages) else {}
    if torch.get("version") is None:
        lines.append("torch is missing: pip install torch")
    elif "error" in torch:
        lines.append(f"torch does not import ({torch['error']}): reinstall it")
    elif "is too old" in operators.get("reason", ""):
        lines.append("this torch is too old: pip install 'torch>=2.10'; chatterbox-tts then with --no-deps")
    elif not operators.get("loaded"):
        lines.append(_library_advice(operators))
    elif not operators.get("self_test", {}).get("ok", True):
        lines.append("the self-test failed: please report it with the output of vivace doctor --json")
    elif not report["engine"].get("loaded"):
        lines.append(_engine_advice(report["engine"]))
    driver = report["machine"].get("driver", {}) if not failed(report["machine"]) else {}
    if driver.get("installed") and not driver.get("reason") and torch.get("version") and not torch.get("cuda"):
        lines.append("there is an NVIDIA driver, but this torch is built without CUDA: install torch's CUDA build")
    chatterbox = packages.get("chatterbox-tts", {}) if not failed(packages) else {}
    if chatterbox.get("version") and operators.get("loaded"):
        lines.append("Chatterbox: import vivace; vivace.accelerate(tts)")
    transformers = packages.get("transformers", {}) if not failed(packages) else {}
    if transformers.get("version") and report["gpu"]["usable"]:
        lines.append('transformers: import vivace; vivace.enable("auto") before the model is built')
    lines.extend((report.get("model") or {}).get("advice", ()))
    return lines


def _library_advice(operators: dict[str, Any]) -> str:
    """What to do where the operators do not load: reinstalling mends the installed library, not a chosen one."""
    chosen = operators.get("chosen")
    if not chosen:
        return f"reinstall vivace for this torch: {_REINSTALL}"
    wrong = f"VIVACE_OPS_LIBRARY names {chosen}, which cannot be used here"
    if operators.get("installed"):
        return f"{wrong}: unset VIVACE_OPS_LIBRARY, and {operators['installed']} is used"
    return f"{wrong}, and none is installed: name a build of the same source, or unset it and install: {_REINSTALL}"


def _engine_advice(engine: dict[str, Any]) -> str:
    without = "accelerate() uses a loop in Python"
    if chosen := engine.get("chosen"):
        return f"VIVACE_EXTENSION_DIR names {chosen}, without an engine for this torch and Python ({without}): unset it"
    return f"the C++ engine is not for this torch or Python, and {without}: {_REINSTALL}"
