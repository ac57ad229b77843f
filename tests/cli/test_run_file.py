"""``--config``: a run's own file asks for the same run again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import qatc.quantize.run
from qatc.cli.main import app
from qatc.data import CorpusConfig
from qatc.errors import ConfigError
from qatc.quantize import QuantizeConfig
from qatc.quantize.settings import as_options
from qatc.recipe import QuantSpec, Recipe
from qatc.training import TrainingConfig


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[QuantizeConfig]:
    """What ``qatc quantize`` would run."""
    configs: list[QuantizeConfig] = []

    def stop(config: QuantizeConfig, *_: Any) -> None:
        configs.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(qatc.quantize.run, "quantize", stop)
    return configs


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


TRAININGS: tuple[dict[str, Any], ...] = (
    {"teacher": "recorded", "optimizer": "adamw8bit", "master_dtype": "bfloat16", "accumulate": 2}
    | {"offload": "optimizer", "loss_chunk": 7, "checkpoint_activations": True, "train": "norms"},
    {"fused_step": True, "loss_chunk": 0, "train": "lora", "lora_rank": 3},
    {"train": "blockwise+full", "blockwise_steps": 5, "blockwise_rows": 64, "accumulate": 3},
)
"""What does not go together; between them no value is a default."""


def config_of(tmp_path: Path, number: int = 0) -> QuantizeConfig:
    """No value is a default, but for those of other trainings."""
    generation = CorpusConfig()
    return QuantizeConfig(
        model="some/model",
        output=tmp_path / "out",
        recipe=dataclasses.replace(
            Recipe(), weights=QuantSpec(3, 16), skip=("*a*", "*.b"), kv_site="projection"
        ),
        generation=dataclasses.replace(
            generation, sequences=77, max_length=99, strategy="chat", greedy_tokens=(2, 9),
            seed=8, batch_size=3, turns=2, record_logits=None if number else "8+4",
        ),
        training=TrainingConfig(
            steps=11,
            batch_size=5,
            learning_rate=0.25,
            warmup_steps=1,
            gradient_clip=2.0,
            seed=8,
            checkpoint_every=9,
            keep_checkpoints=3,
            loss="label+2*logits:decay",
            **TRAININGS[number],
        ),
        loss_on="all",
        budget=2.5,
        data=tmp_path / "corpus",
        eval_text=tmp_path / "text.txt",
        eval_sequences=5,
        dtype="float32",
        device="cpu",
        train_embeddings=False,
        compile=False,
        integer_forward=False,
        verify=False,
        trust_remote_code=True,
    )  # fmt: skip


def test_every_setting_is_another_one_somewhere(tmp_path: Path) -> None:
    """A setting to come is found here."""
    configs = [config_of(tmp_path, number) for number in range(len(TRAININGS))]
    plain = QuantizeConfig("x", tmp_path / "out")
    for name in ("generation", "training"):
        for field in dataclasses.fields(getattr(plain, name)):
            if field.name == "shard_size":  # no option
                continue
            default = getattr(getattr(plain, name), field.name)
            values = [getattr(getattr(config, name), field.name) for config in configs]
            assert any(value != default for value in values), f"{field.name} is the default"


@pytest.mark.parametrize("number", range(len(TRAININGS)))
def test_a_run_is_asked_for_again_in_every_setting(
    asked: list[QuantizeConfig], tmp_path: Path, number: int
) -> None:
    config = config_of(tmp_path, number)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(as_options(config)))
    assert run("--config", file, "--output", config.output).exit_code == 2
    assert asked == [config]


def test_the_command_line_wins(asked: list[QuantizeConfig], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: some/model\nbits: 4-8-8\nsteps: 7\nbatch-size: 3\ncompile: false\n")
    assert (
        run("--config", file, "--steps", 9, "--compile", "--output", tmp_path / "o").exit_code == 2
    )
    (config,) = asked
    assert (config.training.steps, config.training.batch_size, config.compile) == (9, 3, True)
    assert config.model == "some/model" and config.recipe.bits == "4-8-8"


def test_an_output_of_a_budget_is_named_after_it(
    asked: list[QuantizeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--model", "some/model", "--bits", "4-8-8", "--budget", "4.50").exit_code == 2
    (config,) = asked
    assert config.output == Path("model-4.5-8-8") and config.budget == 4.5
    refused = run("--model", "some/model", "--budget", "9")
    assert refused.exit_code == 2 and "2 to 8, such as 4.5; got 9.0" in refused.stderr


def test_what_no_options_can_say(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert as_options(dataclasses.replace(config, eval_tokens=3)) is None
    training = dataclasses.replace(config.training, seed=9)
    assert as_options(dataclasses.replace(config, training=training)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step: 3\n", "there is steps"),
        ("steps: many\n", "for '--steps'"),
        ("[1, 2]\n", "holds no options"),
        ("a: [\n", "not valid YAML"),
        ("recipe: {wights: 3}\n", "wights"),
        ("config: again.yaml\n", "no option 'config'"),
        ("recipe: {weights: {bits: 4}}\nbits: 4-8-4\n", "leave out --bits"),
    ],
)
def test_files_that_are_wrong(
    asked: list[QuantizeConfig], tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    result = run("--config", file, "--model", "m", "--output", tmp_path / "o")
    assert result.exit_code == 2 and not asked
    assert says in " ".join(result.output.replace("│", " ").split())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = run("--config", tmp_path / "no.yaml", "--model", "m")
    assert result.exit_code == 2 and "cannot read" in result.output
