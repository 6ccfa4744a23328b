"""Everything that was found, as a dict and as text."""

import json
from typing import Any

from vivace.doctor import advice
from vivace.doctor.attempt import attempt, failed


class Report(dict):
    """The facts by section; prints as text.

    Keys: machine, packages, operators, engine, gpu, status, meaning, advice, and where asked for model and trial.
    """

    @property
    def status(self) -> int:
        """The exit status of `vivace doctor`: 0, 3, 4 or 5."""
        return self["status"]

    def json(self) -> str:
        return json.dumps(self, indent=1, default=str)

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__


def make_report(model: Any = None, self_test: bool = True, trial: str | None = None) -> Report:
    from vivace.doctor.machine import machine
    from vivace.doctor.packages import packages

    report = Report(machine=attempt(machine), packages=attempt(packages))
    report["operators"] = _section(lambda: _operators(self_test))
    report["engine"] = _section(_engine)
    report["gpu"] = _gpu()
    if model is not None:
        report["model"] = _model(model)
    if trial is not None:
        report["trial"] = _trial(trial)
    report["status"] = advice.status(report)
    report["meaning"] = advice.MEANING[report["status"]]
    report["advice"] = advice.advice(report)
    return report


def _operators(self_test: bool) -> dict[str, Any]:
    from vivace.doctor.operators import operators

    return operators(self_test)


def _engine() -> dict[str, Any]:
    from vivace.doctor.operators import engine

    return engine()


def _section(look: Any) -> dict[str, Any]:
    found = attempt(look)
    return {"loaded": False, "reason": found["error"]} if failed(found) else found


def _gpu() -> dict[str, Any]:
    """Whether vivace's kernels run on a GPU here, and why not."""

    def look() -> str | None:
        import torch

        from vivace.policy import why_not

        return why_not("cuda" if torch.cuda.is_available() else None)

    reason = attempt(look)
    if failed(reason):
        reason = reason["error"]
    return {"usable": reason is None} | ({} if reason is None else {"reason": reason})


def _model(model: Any) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        from vivace.doctor.model import examine

        return examine(model)

    found = attempt(look)
    return {"model": str(model), **found} if failed(found) else found


def _trial(shape: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        from vivace.doctor.trial import trial

        return trial(shape)

    found = attempt(look)
    return {"steps": [], "ok": False, **found} if failed(found) else found


# Text


def text(report: dict[str, Any]) -> str:
    lines = [*_machine_lines(report), "", *_operator_lines(report)]
    if "model" in report:
        lines += ["", *_model_lines(report["model"])]
    if "trial" in report:
        lines += ["", *_trial_lines(report["trial"])]
    lines += ["", f"status {report['status']}: {report['meaning']}"]
    lines += [f"  {line}" for line in report["advice"]]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name:<16}{value}"


def _machine_lines(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    if failed(machine):
        return [_row("machine", machine["error"])]
    lines = [_row("system", machine["system"]), _row("python", machine["python"])]
    driver = machine["driver"]
    if failed(driver):
        lines.append(_row("driver", driver["error"]))
    elif not driver["installed"]:
        lines.append(_row("driver", f"none ({driver['reason']})"))
    else:
        known = [driver.get("version") or "version unknown", f"CUDA up to {driver['cuda']}" if "cuda" in driver else ""]
        lines.append(_row("driver", ", ".join([*filter(None, known), *filter(None, [driver.get("reason")])])))
    gpus = machine["gpus"]
    if failed(gpus):
        lines.append(_row("GPU", gpus["error"]))
    for gpu in [] if failed(gpus) else gpus:
        details = f", compute capability {gpu['capability']}, {gpu['free_gib']} of {gpu['memory_gib']} GiB free"
        lines.append(_row(gpu["device"], gpu["name"] + (details if "capability" in gpu else "")))
    if gpus == []:
        lines.append(_row("GPU", "none that torch sees"))
    packages = report["packages"]
    if failed(packages):
        return [*lines, _row("packages", packages["error"])]
    for name, package in packages.items():
        version = package["version"] or "not installed"
        build = f", CUDA {package['cuda']}" if package.get("cuda") else ", ROCm" if package.get("hip") else ""
        broken = f", does not import: {package['error']}" if "error" in package else ""
        lines.append(_row(name, version + build + broken))
    return lines


def _operator_lines(report: dict[str, Any]) -> list[str]:
    operators, engine, gpu = report["operators"], report["engine"], report["gpu"]
    lines = [_row("operators", "load" if operators["loaded"] else f"do not load: {operators.get('reason')}")]
    build = operators.get("build")
    if build:
        archs = build.get("cuda_archs") or build.get("archs")
        cuda = f"CUDA {build['cuda']}" if build.get("cuda") else "no CUDA"
        lines.append(_row("", f"{operators['path']}: built with torch {build.get('torch_built')}, {cuda}"))
        if archs:
            lines.append(_row("", f"for {archs}"))
    test = operators.get("self_test")
    if test is not None:
        if test["ok"]:
            lines.append(
                _row("self-test", f"{test['passed']} passed on {', '.join(test['devices'])} in {test['seconds']} s")
            )
        else:
            lines.append(_row("self-test", f"FAILED: {test.get('error') or test.get('failed')}"))
    lines.append(_row("engine", "loads" if engine["loaded"] else f"does not load: {engine.get('reason')}"))
    lines.append(_row("kernels", "run on this GPU" if gpu["usable"] else f"not used: {gpu['reason']}"))
    return lines


def _model_lines(model: dict[str, Any]) -> list[str]:
    if "error" in model:
        return [_row("model", f"{model['model']}: {model['error']}")]
    extra = "".join(f", {model[key]}" for key in ("dtype",) if key in model)
    lines = [_row("model", f"{model['model']} ({model['kind']}{extra})")]
    # Neighbours that run the same are one line.
    groups: list[tuple[list[str], str, str]] = []
    for layer in model["layers"]:
        if groups and groups[-1][1:] == (layer["implementation"], layer["reason"]):
            groups[-1][0].append(layer["layer"])
        else:
            groups.append(([layer["layer"]], layer["implementation"], layer["reason"]))
    for names, implementation, reason in groups:
        name = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        lines.append(f"  {name}: {implementation} ({reason})")
    return lines


def _trial_lines(trial: dict[str, Any]) -> list[str]:
    lines = [_row("T3", f"{trial.get('t3', '')} {trial.get('error', '')}".strip())]
    for step in trial["steps"]:
        facts = {key: value for key, value in step.items() if key not in ("step", "ok", "shapes", "error")}
        shown = ", ".join(f"{key} {value}" for key, value in facts.items())
        lines.append(f"  {'ok    ' if step['ok'] else 'FAILED'} {step['step']}: {step.get('error', shown)}")
        for name, shape in step.get("shapes", {}).items():
            lines.append(f"         {name} {shape}")
    return lines
