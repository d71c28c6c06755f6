"""Loads a config from a file and command-line overrides."""

import difflib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2.config import CfgNode, get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError
from s4m_d2.report.run import CONFIG, FACTS, nested_items

_UNKNOWN_KEY = re.compile(r"Non-existent (?:config )?key: ([\w.]+)")
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(\w+)'> vs\. <class '(\w+)'>\) with values \(.* vs\. (.*)\) for"
    r" config key: (\S+)",
    re.DOTALL,
)
_EXPECTED = {  # by the type of a default
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "tuple": "several values, quoted on the command line: \"('a', 'b')\" or \"('a',)\"",
    "str": "a text",
}
_WHOLE = re.compile(r"[+-]?\d+")
_PACKAGE = Path(__file__).resolve().parents[1]
# The configs are inside the package in a wheel, beside it in a clone.
_CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"
_PATHS = ("LABELED", "IMAGES")  # of S4M.DATA: a path, or a list of paths
_FOR_OTHER_DATA = ("Base-", "cityscapes_", "coco_", "toyscapes_")


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Merge defaults, the file (with its ``_BASE_``) and the overrides; the result is frozen.

    The file of a run, config.yaml in its OUTPUT_DIR, sets OUTPUT_DIR to where it is now.

    Args:
        config_file: plain YAML, or the name of one of this project's configs; "": none.
        opts: KEY VALUE KEY VALUE …, values as Python literals or plain strings.

    Raises:
        ConfigError: names the file or override, the key, and the most similar key.
    """
    cfg = get_cfg()
    add_s4m_config(cfg)
    data = cfg.S4M.DATA
    data.update(dict.fromkeys(_PATHS))  # None takes values of any type
    config_file = config_path(config_file)
    if config_file:
        if not os.path.isfile(config_file):
            raise ConfigError(
                f"Config file '{config_file}' does not exist. Give a path that starts at "
                f"'{os.getcwd()}', an absolute one, or a name: {', '.join(_names())}."
            )
        try:
            loaded = CfgNode(_fitted(_StrictConfig.load_yaml_with_base(config_file), cfg))
            if loaded.get("VERSION", cfg.VERSION) != cfg.VERSION:
                raise ValueError(f"VERSION is {loaded.VERSION}, expected {cfg.VERSION}")
            cfg.merge_from_other_cfg(loaded)
        except Exception as error:  # of fvcore, yacs or PyYAML, which check little
            raise ConfigError(f"Config file '{config_file}': {_explain(cfg, error)}") from error
    defaults = config_items(cfg)
    if len(opts) % 2:
        wrong = [f"'{key}' is no key." for key in opts[::2] if key not in defaults]
        wrong += [f"'{opts[-1]}' has no value. Add it."]
        raise ConfigError(f"KEY VALUE pairs follow options, which take one value; {wrong[0]}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key.removeprefix("S4M.DATA.") in _PATHS:
            data[key.removeprefix("S4M.DATA.")] = None
        try:
            cfg.merge_from_list([key, _fitted(value, defaults.get(key))])
        except Exception as error:
            raise ConfigError(f"Override '{key} {value}': {_explain(cfg, error)}") from error
    for name in _PATHS:
        found = data[name] if isinstance(data[name], list | tuple) else [data[name]]
        data[name] = tuple(str(path) for path in found if path)
    if "OUTPUT_DIR" not in opts[::2]:
        _place_run(cfg, *os.path.split(os.path.abspath(config_file)))
    cfg.freeze()
    return cfg


def _fitted(value: Any, default: Any) -> Any:
    """Convert what defaults to a float or a flag: 1, true, false; also in nested dicts."""
    if isinstance(value, dict) and isinstance(default, dict):
        return {key: _fitted(inner, default.get(key)) for key, inner in value.items()}
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(str(value).lower(), value)
    is_whole = isinstance(default, float) and _WHOLE.fullmatch(str(value))
    return float(value) if is_whole else value


def _place_run(cfg: CfgNode, folder: str, name: str) -> None:
    """Set OUTPUT_DIR, and a SAM in it, to the folder, if the file in it is a run's."""
    if name == CONFIG and os.path.isfile(os.path.join(folder, FACTS)):
        former, sam = os.path.join(cfg.OUTPUT_DIR, ""), cfg.S4M.SAM
        if sam.CHECKPOINT.startswith(former):
            sam.CHECKPOINT = os.path.join(folder, sam.CHECKPOINT.removeprefix(former))
        cfg.OUTPUT_DIR = folder


def explicit_keys(config_file: str = "", opts: Sequence[str] = ()) -> set[str]:
    """Keys that the user set: in the file or its ``_BASE_``, but this project's for other data, and
    in the overrides (which are valid)."""
    nested = _UsersConfig.load_yaml_with_base(config_path(config_file)) if config_file else {}
    return {*config_items(nested), *opts[::2]}


def _names() -> list[str]:
    return sorted(path.stem for path in _CONFIGS.glob("[a-z]*.yaml"))


def config_path(config_file: str) -> str:
    """Path of a config: a path is unchanged, a name is one of this project's configs."""
    named = config_file in _names() and not os.path.isfile(config_file)
    return str(_CONFIGS / f"{config_file}.yaml") if named else config_file


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key twice in one section, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            line = f"from line {node.start_mark.line + 1}"
            raise ValueError(f"'{twice[0]}' stands twice in one section, {line}: join the two.")
        return super().construct_mapping(node, deep)


class _StrictConfig(CfgNode):
    """A config whose files are read by :class:`_StrictLoader` first."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        with super()._open_cfg(filename) as file:
            _StrictLoader(file).get_single_data()
        return super()._open_cfg(filename)


class _UsersConfig(CfgNode):
    """A config that reads this project's files for other data sets as empty."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        path = Path(filename).resolve()
        if path.parent == _CONFIGS and path.name.startswith(_FOR_OTHER_DATA):
            return io.StringIO("{}")
        return super()._open_cfg(filename)


def _explain(cfg: CfgNode, error: Exception) -> str:
    """Reword an error of fvcore, yacs or PyYAML."""
    if isinstance(error, RecursionError):
        return "_BASE_ leads back to the file itself, or values nest too deep. Correct the file."
    if isinstance(error, yaml.YAMLError):
        return f"only plain YAML is read, no tags that build objects: {error}. Correct it."
    if isinstance(error, OSError):
        named = f"'{error.filename}', named as _BASE_, cannot be read: {error.strerror}"
        return f"{named}. Correct the path; a relative one starts at the file's own folder."
    quoted = isinstance(error, KeyError) and error.args  # whose text would be in quotes
    message = str(error.args[0] if quoted else error)
    if unknown := _UNKNOWN_KEY.search(message):
        return f"the key {unknown[1]} does not exist.{_suggest(cfg, unknown[1])}"
    if found := _MISMATCH.search(message):
        expected, given, value, key = found.groups()
        expected = _EXPECTED.get(expected, expected)
        return f"Type mismatch: {key} is {value} ({given}); expected {expected}."
    return f"expected keys and values as in configs/; {message or type(error).__name__}"


def _suggest(cfg: CfgNode, key: str) -> str:
    known = {name.upper(): name for name in config_items(cfg)}
    if key in known.values():
        return f" Write it nested: {key.replace('.', ': {')}: VALUE{'}' * key.count('.')}"
    # Most mistakes keep the last word and misplace it, or misspell it in place.
    last = key.upper().rsplit(".", 1)[-1]
    same = [name for name in known if name.rsplit(".", 1)[-1] == last]
    found = same or difflib.get_close_matches(key.upper(), known, n=1)
    return f" Did you mean {known[found[0]]}?" if found else " Choose one of s4m_d2/config.py."


def config_items(node: dict[str, Any]) -> dict[str, Any]:
    """Values of a config by dotted key, those of sections too."""
    return {".".join(path): value for path, value in nested_items(node)}
