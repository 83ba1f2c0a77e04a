"""Settings from a YAML file and --set, and what is said of wrong ones."""

import json
from pathlib import Path

import pytest

from jobs.configuration import settings_from, write_json
from jobs.pretrain_settings import PretrainSettings
from lib.errors import InputError


def settings(*assignments: str, config: Path | None = None) -> PretrainSettings:
    return settings_from(PretrainSettings, config, assignments)


def test_assignments_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("epochs: 7\ndropout: 0.1\n")
    chosen = settings("epochs=9", "holdout=temporal", "learning_rate=1e-3", config=config)
    assert chosen == PretrainSettings(epochs=9, dropout=0.1, holdout="temporal", learning_rate=0.001)
    assert settings() == PretrainSettings()
    assert settings("inputs=gap") == PretrainSettings(inputs=["gap"])


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert settings(config=tmp_path / "empty.yaml") == PretrainSettings()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "--set epochs: write key=value"),
        ("=3", "--set =3: write key=value"),
        ("epochs=[", "--set epochs=[: the value is not valid YAML; put it in quotes"),
        ("epoch=3", "epoch: no such setting, did you mean epochs? there are holdout, "),
        ("xyz=1", "xyz: no such setting; there are holdout, "),
        ("epochs=ten", "epochs: input should be a valid integer, unable to parse string as an integer, got 'ten'"),
        ("epochs=2.5", "epochs: input should be a valid integer, got a number with a fractional part, got 2.5"),
        ("epochs=0", "epochs: input should be greater than 0, got 0"),
        ("max_length=1", "max_length: input should be greater than or equal to 2, got 1"),
        ("learning_rate=0", "learning_rate: input should be greater than 0, got 0"),
        ("learning_rate=.nan", "learning_rate: input should be a finite number, got nan"),
        ("clip_norm=.inf", "clip_norm: input should be a finite number, got inf"),
        ("dropout=1", "dropout: input should be less than 1, got 1"),
        ("weight_decay=-1", "weight_decay: input should be greater than or equal to 0, got -1"),
        ("seed=-1", "seed: input should be greater than or equal to 0, got -1"),
        ("inputs=kinds", "inputs.0: input should be 'kind', 'gap', 'value' or 'attributes', got 'kinds'"),
        ("inputs=", "inputs: None is no list; write one as [a, b]"),
        ("holdout=newest", "holdout: input should be 'leave-one-out', 'temporal' or 'none', got 'newest'"),
    ],
)
def test_a_wrong_assignment_is_named_with_the_remedy(assignment, message):
    with pytest.raises(InputError) as caught:
        settings(assignment)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- epochs\n", "must be a mapping of settings, such as `epochs: 20`"),
        (b"3: 4\n", "must be a mapping of settings"),
        (b"epochs: [\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    config = tmp_path / "settings.yaml"
    config.write_bytes(content)
    with pytest.raises(InputError) as caught:
        settings(config=config)
    assert str(caught.value).startswith(f"config: {config} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config: .*absent\.yaml cannot be read \(No such file or directory\)"):
        settings(config=tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"config: .* cannot be read \(Is a directory\)"):
        settings(config=tmp_path)


def test_results_are_written_where_json_says(tmp_path):
    write_json(tmp_path / "new" / "result.json", {"a": [1]})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"a": [1]}
    with pytest.raises(InputError, match=r"json: .* cannot be written"):
        write_json(tmp_path, {})
