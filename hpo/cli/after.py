"""The command for a trained model: after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import CodeOption, JsonOption, app, examples, quiet_optuna, users_folder


@app.command(epilog=examples("hpo after runs/digits fold int8", "hpo after runs/digits fold+prune=0.5 --export onnx"))
def after(
    folder: Annotated[Path, typer.Argument(help="Output folder of `hpo train`.")],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Variants of the model to make: fold, prune=0.5, channels=0.25, bf16, fp16, int8, int8_weights, "
            "int8_static. A + joins steps of one variant: fold+prune=0.5."
        ),
    ] = None,
    mc_dropout: Annotated[
        int | None,
        typer.Option("--mc-dropout", min=2, max=100_000, help="Measure uncertainty by this many dropout passes."),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", help="Export the model and each variant as pt2 or onnx. May be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Output folder. Default: FOLDER/after.")] = None,
    json: JsonOption = False,
    code: CodeOption = None,
) -> None:
    """Prune, quantise and export a trained model. Each variant is scored on the validation part."""
    from hpo.errors import SpecError, nearest
    from hpo.files import without_nan
    from hpo.final.after import files, report, steps, trained
    from hpo.view import variants

    wanted = [steps.read(text) for text in dict.fromkeys(recipes or [])]
    formats = list(dict.fromkeys(export or []))
    for one in formats:
        if one not in files.FORMATS:
            raise SpecError(f"--export {one}: there is no such format{nearest(one, files.FORMATS)}")
    quiet_optuna()
    target = output or folder / "after"
    with users_folder():
        model = trained.load(folder, code)
    made = report.make(model, wanted, target, passes=mc_dropout, formats=formats)
    if json:
        text.say_json(without_nan(made.to_json()))
    else:
        text.say_page(variants.report_text(made))
    for why in made.refused:
        text.say(f"error: {why}", to=sys.stderr)
    if not json:
        text.say(f"in {target}: {', '.join(sorted(path.name for path in target.iterdir()))}")
    raise typer.Exit(int(bool(made.refused)))
