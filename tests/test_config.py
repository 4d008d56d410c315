from __future__ import annotations  # Annotations as strings must work: config files may use them.

import abc
import dataclasses
import importlib
import json
import subprocess
import sys
import textwrap
from typing import Any, Literal

import pytest

from stca_jax import config as config_lib
from stca_jax import imports
from stca_jax.config import ConfigError
from stca_jax.errors import UserError


def dataclass(cls):
    return dataclasses.dataclass(frozen=True)(cls)


@dataclass
class StcaConfig:
    num_layers: int = 2
    widths: tuple[int, ...] = (8, 8)


@dataclass
class DinConfig:
    units: int
    activation: Literal["relu", "silu"] = "relu"


@dataclass
class ModelConfig:
    embed_dim: int = 8
    num_heads: int = 2
    dropout: float | None = None
    sequence: StcaConfig | DinConfig = dataclasses.field(default_factory=StcaConfig)

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of {self.num_heads}")


@dataclass
class EvalConfig:
    name: str = "test"
    lengths: tuple[int, ...] = (16,)


@dataclass
class WandbConfig:
    project: str = "stca"


@dataclass
class Config:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    evaluations: tuple[EvalConfig, ...] = (EvalConfig(), EvalConfig("long", (32, 64)))
    learning_rate: float = 1e-3
    shuffle: bool = True
    title: str | None = None
    seed: int | Literal["random"] = 0
    window: tuple[int, float] = (1, 0.5)
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    wandb: WandbConfig | None = None


OTHER = Config(
    model=ModelConfig(embed_dim=12, dropout=0.1, sequence=DinConfig(3, "silu")),
    evaluations=(EvalConfig("a", ()),),
    learning_rate=float("inf"),
    title="x=1, y",
    seed="random",
    pairs=(),
    wandb=WandbConfig(),
)


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[int(name)] if name.isdecimal() else getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.embed_dim", "1_000", 1000),
        ("model.embed_dim", "-4", -4),
        ("learning_rate", "1e-2", 0.01),
        ("learning_rate", "3", 3.0),
        ("model.dropout", "none", None),
        ("model.dropout", "0.5", 0.5),
        ("shuffle", "False", False),
        ("title", "none", None),
        ("title", "a=b, c", "a=b, c"),
        ("seed", "7", 7),
        ("seed", "random", "random"),
        ("window", "(2,3)", (2, 3.0)),
        ("model.sequence.widths", "1, 2,3", (1, 2, 3)),
        ("model.sequence.widths", "4", (4,)),
        ("model.sequence.widths", "", ()),
        ("evaluations.1.lengths", "5,6", (5, 6)),
        ("evaluations.0", "EvalConfig", EvalConfig()),
        ("evaluations", "EvalConfig", (EvalConfig(),)),
        ("pairs.0", "3,4", (3, 4)),
        ("pairs.0.1", "9", 9),
        ("pairs", "(3,4),(5, 6)", ((3, 4), (5, 6))),
        ("pairs", "((3,4), (5,6))", ((3, 4), (5, 6))),
        ("pairs", "(3,4),", ((3, 4),)),
        ("pairs", "", ()),
        ("wandb", "WandbConfig", WandbConfig()),
        ("model.embed_dim", 16, 16),
        ("pairs", ((5, 6), (7, 8)), ((5, 6), (7, 8))),
        ("model.sequence", DinConfig(3), DinConfig(3)),
    ],
)
def test_override_is_read_by_annotation(path, text, expected):
    found = _get(config_lib.apply_overrides(Config(), {path: text}), path)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (
            "model.num_head",
            "4",
            r"config.model.num_head: ModelConfig .*config.model.num_heads\?",
        ),
        ("modle.num_heads", "4", r"config.modle: .*did you mean config.model\?"),
        ("dropout", "4", r"config.dropout: .*did you mean config.model.dropout\?"),
        ("model.zzz", "4", "its fields: embed_dim, num_heads, dropout, sequence"),
        ("model.embed_dim", "4.0", "config.model.embed_dim: expected int, got '4.0'"),
        ("model.embed_dim", 4.0, r"config.model.embed_dim: expected int, got 4\.0"),
        ("model.embed_dim", True, "expected int, got True"),
        ("model.embed_dim", [4], r"config.model.embed_dim: \[4\] is of type list; use a tuple"),
        ("model.dropout", "high", r"config.model.dropout: expected float \| none, got 'high'"),
        ("shuffle", "1", "config.shuffle: expected bool, got '1'"),
        ("seed", "ramdom", r"expected int \| one of 'random', got 'ramdom'"),
        ("window", "1,2,3", "config.window: expected the 2 values of .*, got 3"),
        ("model.sequence.widths", "1,x", "config.model.sequence.widths.1: expected int, got 'x'"),
        ("model.sequence", "Din", r"expected StcaConfig \| DinConfig, got 'Din'"),
        ("model.sequence", "DinConfig", "config.model.sequence: DinConfig lacks a value for units"),
        ("model.num_heads", "3", "config.model: embed_dim=8 must be a multiple of 3"),
        ("model.num_heads.x", "3", "config.model.num_heads is 2 and has no 'x'"),
        ("wandb.project", "x", "first: config.wandb=WandbConfig"),
        ("evaluations.2.name", "x", "config.evaluations.2: "),
        ("pairs", "(1,2),(3)", r"config.pairs.1: expected the 2 values of .*, got 1"),
    ],
)
def test_wrong_override_says_where_and_why(path, text, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.apply_overrides(Config(), {path: text})


def test_overrides_act_together():
    # Neither alone gives a valid ModelConfig; the class is chosen before its fields, in any order.
    overrides = {"model.sequence.units": "5", "model.num_heads": "3", "model.embed_dim": "9"}
    result = config_lib.apply_overrides(Config(), overrides | {"model.sequence": "DinConfig"})
    assert result == Config(model=ModelConfig(9, 3, sequence=DinConfig(5)))


def test_naming_the_present_class_keeps_its_values():
    assert config_lib.apply_overrides(OTHER, {"model.sequence": "DinConfig"}) == OTHER


@pytest.mark.parametrize("config", [Config(), OTHER])
def test_json_round_trip(config):
    data = config_lib.to_dict(config)
    assert config_lib.from_dict(Config, json.loads(json.dumps(data))) == config
    assert config_lib.apply_overrides(config, config_lib.flatten(config)) == config
    config_lib.validate(config)


def test_an_int_in_a_float_field_becomes_a_float():
    loaded = config_lib.apply_overrides(Config(learning_rate=1), {})
    assert type(loaded.learning_rate) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, r"config.seeds: Config has no field 'seeds'; did you mean config.seed\?"),
        ({"seed": None}, "config.seed: expected"),
        ({"type": "OtherConfig"}, "config: expected Config, got OtherConfig"),
        ({"wandb": {"type": "Mlflow"}}, r"config.wandb: expected WandbConfig \| none, got Mlflow"),
        ({"pairs": [[1, 2], [3]]}, "config.pairs.1: expected the 2 values"),
    ],
)
def test_from_dict_is_strict(change, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.from_dict(Config, config_lib.to_dict(Config()) | change)


def test_from_dict_refuses_missing_keys():
    data = config_lib.to_dict(Config())
    del data["seed"]
    with pytest.raises(ConfigError, match="config: Config lacks a value for seed"):
        config_lib.from_dict(Config, data)


def test_fields_that_came_later_take_their_defaults():
    config = Config(ModelConfig(num_heads=4, sequence=StcaConfig(3)), seed=7)
    data = config_lib.to_dict(config)
    del data["shuffle"], data["model"]["dropout"], data["model"]["sequence"]["widths"]
    filled, names = config_lib.fill_missing(Config, data)
    assert config_lib.from_dict(Config, filled) == config
    assert sorted(names) == [
        "model.dropout=None",
        "model.sequence.widths=[8, 8]",
        "shuffle=True",
    ]
    assert "shuffle" not in data
    assert config_lib.fill_missing(Config, filled) == (filled, [])


def test_filling_hides_neither_removed_fields_nor_required_ones():
    data = config_lib.to_dict(Config()) | {"gone": 1}
    with pytest.raises(ConfigError, match="Config has no field 'gone'"):
        config_lib.from_dict(Config, config_lib.fill_missing(Config, data)[0])
    data = config_lib.to_dict(Config(ModelConfig(sequence=DinConfig(2))))
    del data["model"]["sequence"]["units"]
    with pytest.raises(ConfigError, match="DinConfig lacks a value for units"):
        config_lib.from_dict(Config, config_lib.fill_missing(Config, data)[0])


def test_validate_finds_wrong_values_given_in_python():
    with pytest.raises(
        ConfigError, match=r"config.model.sequence.num_layers: expected int, got '3'"
    ):
        config_lib.validate(Config(ModelConfig(sequence=StcaConfig("3"))))
    with pytest.raises(ConfigError, match=r"config.model.sequence: expected .*, got EvalConfig"):
        config_lib.apply_overrides(
            Config(ModelConfig(sequence=EvalConfig())), {"model.sequence.name": "x"}
        )
    with pytest.raises(ConfigError, match="expected an instance of a dataclass, got 3"):
        config_lib.validate(3)


@dataclasses.dataclass
class Mutable:
    a: int = 0


@dataclass
class Untyped:
    a: Any = 0


@dataclass
class Reserved:
    type: str = ""


@pytest.mark.parametrize(
    ("config", "message"),
    [(Mutable(), "frozen=True"), (Untyped(), r"Untyped.a \(.*Any\)"), (Reserved(), "another name")],
)
def test_classes_that_cannot_be_configurations(config, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.validate(config)


def test_flatten_and_diff():
    assert config_lib.flatten(ModelConfig()) == {
        "embed_dim": 8,
        "num_heads": 2,
        "dropout": None,
        "sequence": "StcaConfig",
        "sequence.num_layers": 2,
        "sequence.widths": (8, 8),
    }
    assert config_lib.diff(Config(), Config()) == []
    assert config_lib.diff(ModelConfig(), ModelConfig(12, sequence=DinConfig(3))) == [
        "embed_dim: 8 -> 12",
        "sequence: 'StcaConfig' -> 'DinConfig'",
        "sequence.num_layers: 2 -> (absent)",
        "sequence.widths: (8, 8) -> (absent)",
        "sequence.units: (absent) -> 3",
        "sequence.activation: (absent) -> 'relu'",
    ]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of a user's: config classes that no annotation of ours lists."""
    code = """
        import dataclasses

        from test_config import Length, StcaConfig

        @dataclasses.dataclass(frozen=True)
        class Deep(StcaConfig):
            dropout: float = 0.0

        @dataclasses.dataclass(frozen=True)
        class Weekly(Length):
            days: int = 7

            def sample(self):
                return self.days

        class Plain(StcaConfig):
            pass

        @dataclasses.dataclass(frozen=True)
        class Unfinished(Length):
            days: int = 7

        number = 3
    """
    (tmp_path / "own_module.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_module")
    sys.modules.pop("own_module")
    imports.registered_names.cache_clear()


@dataclass
class Length(abc.ABC):
    @abc.abstractmethod
    def sample(self): ...


@dataclass
class Fixed(Length):
    events: int = 5

    def sample(self):
        return self.events


@dataclass
class Open:
    sequence: StcaConfig | DinConfig = dataclasses.field(default_factory=StcaConfig)
    length: Fixed | Length = dataclasses.field(default_factory=Fixed)
    lengths: tuple[Length, ...] = ()


def test_classes_of_ones_own_are_chosen_by_import_path(own_module):
    overrides = {
        "sequence": "own_module:Deep",
        "sequence.dropout": "0.5",
        "sequence.num_layers": "3",
        "length": "own_module:Weekly",
        "length.days": "3",
        "lengths": "own_module:Weekly,own_module:Weekly",
        "lengths.1.days": "2",
    }
    config = config_lib.apply_overrides(Open(), overrides)
    lengths = (own_module.Weekly(), own_module.Weekly(2))
    assert config == Open(own_module.Deep(3, dropout=0.5), own_module.Weekly(3), lengths)
    data = json.loads(json.dumps(config_lib.to_dict(config)))
    assert data["sequence"]["type"] == "own_module:Deep"
    assert config_lib.from_dict(Open, data) == config
    assert config_lib.apply_overrides(config, config_lib.flatten(config)) == config
    kept = config_lib.apply_overrides(config, {"sequence": "own_module:Deep"})
    assert kept == config
    del data["sequence"]["dropout"], data["length"]["days"]
    filled, names = config_lib.fill_missing(Open, data)
    assert names == ["sequence.dropout=0.0", "length.days=7"]
    assert config_lib.from_dict(Open, filled).length == own_module.Weekly()


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("length", "Length", r"config.length: expected Fixed \| Length, got 'Length'"),
        ("length", "no_module:X", "config.length: no_module:X: there is no module 'no_module'"),
        ("length", "own_module.sub:X", "there is no module 'own_module.sub'"),
        ("length", "own_module:Weekli", "config.length: .*did you mean Weekly"),
        ("length", "own_module:Deep", "config.length: .* derives from Length"),
        ("length", "own_module:Unfinished", "with all of its methods"),
        ("length", "own_module:number", "derives from Length"),
        ("sequence", "own_module:Weekly", "derives from StcaConfig or DinConfig"),
        ("length.days", "own_module:Weekly", "Fixed has no field 'days'"),
        ("sequence.dropout", "1", "StcaConfig has no field 'dropout'"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_import_paths_that_cannot_stand_there(path, text, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.apply_overrides(Open(), {path: text})


def register(folder, package, **names):
    """Makes an installed package of a folder, as pip does."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    points = "\n".join(f"{name} = {path}" for name, path in names.items())
    (info / "entry_points.txt").write_text(f"[stca_jax]\n{points}\n")
    imports.registered_names.cache_clear()


def test_registered_names_stand_for_import_paths(own_module, tmp_path):
    register(tmp_path, "own", deep="own_module:Deep", weekly="own_module:Weekly", n="gone:X")
    overrides = {"sequence": "deep", "sequence.dropout": "0.5", "length": "weekly"}
    config = config_lib.apply_overrides(Open(), {**overrides, "lengths": "weekly,weekly"})
    weekly = own_module.Weekly()
    assert config == Open(own_module.Deep(dropout=0.5), weekly, (weekly, weekly))
    # Saved by import path: the name may be another tomorrow, or elsewhere.
    assert config_lib.to_dict(config)["sequence"]["type"] == "own_module:Deep"
    assert config_lib.apply_overrides(config, {"sequence": "deep"}) == config
    for text, message in (
        ("deep", "derives from Length"),
        ("n", "there is no module 'gone'"),
        ("dep", r"expected Fixed \| Length, got 'dep'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_lib.apply_overrides(Open(), {"length": text})
    with pytest.raises(UserError, match=r"'x' is no import path.*\(registered: deep, n, weekly\)"):
        imports.import_object("x")
    register(tmp_path, "other", deep="elsewhere:Deep")
    with pytest.raises(ConfigError, match="registered for elsewhere:Deep and own_module:Deep"):
        config_lib.apply_overrides(Open(), {"sequence": "deep"})


def test_errors_of_the_module_itself_are_passed_on(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        config_lib.apply_overrides(Open(), {"length": "breaks:X"})


def test_a_class_that_no_other_process_can_import_is_refused():
    @dataclass
    class Here(StcaConfig):
        pass

    with pytest.raises(UserError, match="Here is defined in test_config, from where no other"):
        config_lib.to_dict(Open(sequence=Here()))


def test_load_config(tmp_path):
    file = tmp_path / "base.py"
    code = """
        from __future__ import annotations
        import dataclasses

        @dataclasses.dataclass(frozen=True)
        class Local:
            steps: int = {}

        @dataclasses.dataclass(frozen=True)
        class Experiment:
            local: Local = dataclasses.field(default_factory=Local)

        def get_config():
            return Experiment()
    """
    file.write_text(textwrap.dedent(code).format(1))
    assert config_lib.load_config(str(file)).local.steps == 1
    assert config_lib.load_config(str(file), {"local.steps": "7"}).local.steps == 7
    file.write_text(textwrap.dedent(code).format(2))  # Same size, perhaps the same second.
    assert config_lib.load_config(str(file)).local.steps == 2


def test_load_config_errors(tmp_path):
    (tmp_path / "base.py").write_text("x = 1\n")
    (tmp_path / "number.py").write_text("get_config = lambda: 3\n")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*base\.py\?"):
        config_lib.load_config(str(tmp_path / "bse.py"))
    with pytest.raises(ConfigError, match="no file of a similar name"):
        config_lib.load_config(str(tmp_path / "nowhere" / "zzz"))
    with pytest.raises(ConfigError, match=r"base\.py: define get_config\(\)"):
        config_lib.load_config(str(tmp_path / "base.py"))
    with pytest.raises(ConfigError, match="returned 3, not a dataclass"):
        config_lib.load_config(str(tmp_path / "number.py"))
    with pytest.raises(ConfigError, match=r"--config=FILE\.py"):
        config_lib.load_config(None)


def test_parse_config_args():
    argv = "train.py --config c.py --workdir=/w --config.a.b=x=1 --config.n -1 --config.flag"
    argv += " --v 3 --config.n=2 pos -- --config.z=1"
    assert config_lib.parse_config_args(argv.split()) == (
        "c.py",
        {"a.b": "x=1", "n": "2", "flag": "true"},
        ["train.py", "--workdir=/w", "--v", "3", "pos", "--", "--config.z=1"],
    )
    assert config_lib.parse_config_args(["t", "--configs=a"]) == (None, {}, ["t", "--configs=a"])
    assert config_lib.parse_config_args(["t", "--config=c", "--config.last"])[1] == {"last": "true"}


@pytest.mark.parametrize("args", [["--config"], ["--config="], ["--config=a", "--config=b"]])
def test_parse_config_args_wants_one_file(args):
    with pytest.raises(ConfigError, match="give one file"):
        config_lib.parse_config_args(["train.py", *args])


def test_imports_no_jax():
    code = "import stca_jax.config, sys; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
