"""The parameters of a chapter: names, types, defaults and ranges, read from its parameters cell.

Each line of the cell is `name: type = default  # RANGE unit; description`, where RANGE is `4–512`,
`a | b | c` or `any`, and type is one of int, float, bool, str.
"""

import ast
import io
import math
import re
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

from lib.book.places import nearest
from lib.errors import BookError

TYPES = {"int": int, "float": float, "bool": bool, "str": str}
NUMBER = r"[-+−]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
SPAN = re.compile(rf"({NUMBER})\s*[–—-]\s*({NUMBER})(?=[\s;%]|$)")
ITEM = r"(?:\"[^\"]*\"|'[^']*'|[^\s|;]+)"
CHOICES = re.compile(rf"{ITEM}(?:\s*\|\s*{ITEM})+")

Value = int | float | bool | str


@dataclass(frozen=True)
class Parameter:
    """One parameter. `low` and `high` are inclusive; `choices` is empty where any value goes."""

    name: str
    type: str
    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[Value, ...] = ()
    unit: str = ""
    description: str = ""

    @property
    def range(self) -> str:
        """The range in words, as the tables show it: `4–512`, `a | b`, or `any`."""
        if self.choices:
            return " | ".join(str(choice) for choice in self.choices)
        if self.low is None:
            return "any"
        return f"{_number(self.low)}–{_number(self.high)}"

    def check(self, value: Value) -> Value:
        """`value` in this parameter's type; raises BookError where type or range is wrong."""
        kind = type(value).__name__
        if self.type == "float" and kind == "int":
            value = float(value)
        elif kind != self.type:
            raise BookError(f"parameter {self.name} is {self.type}, not {kind} ({value!r})")
        if self.type == "float" and not math.isfinite(value):
            raise BookError(f"parameter {self.name}: {value} is not a finite number")
        wrong = self.choices and value not in self.choices
        if self.low is not None:
            wrong = not self.low <= value <= self.high
        if wrong:
            unit = f" {self.unit}" if self.unit else ""
            raise BookError(f"parameter {self.name}: {value!r} is outside {self.range}{unit}")
        return value

    def parse(self, text: str) -> Value:
        """The value that a reader typed, e.g. `32`, `0.5`, `true`; raises BookError if none."""
        try:
            if self.type == "bool":
                return self.check({"true": True, "false": False}[text.lower()])
            return self.check(TYPES[self.type](text))
        except (KeyError, ValueError):
            say = "true or false" if self.type == "bool" else f"of type {self.type}"
            raise BookError(f"parameter {self.name} must be {say}, not {text!r}") from None

    def as_dict(self) -> dict:
        """A plain dict, with the range in words, for tables and records."""
        return asdict(self) | {"range": self.range}


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else str(value)


def parameters_cell(notebook: nbformat.NotebookNode) -> int | None:
    """Index of the cell tagged `parameters`, or None."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            return index
    return None


def read_parameters(notebook: nbformat.NotebookNode, where: str = "") -> dict[str, Parameter]:
    """All parameters of a chapter by name, in the order of its parameters cell.

    A notebook with no such cell has none. Raises BookError, which begins with `where` and names
    the line, for a line that is not a typed parameter with a range its default is in.
    """
    index = parameters_cell(notebook)
    if index is None:
        return {}
    return parse_source(notebook.cells[index].source, where)


def parse_source(source: str, where: str = "") -> dict[str, Parameter]:
    """The parameters that the source of a parameters cell defines. See `read_parameters`."""
    prefix = f"{where}: parameters cell" if where else "parameters cell"
    try:
        tree = ast.parse(source)
        comments = {
            token.start[0]: token.string.lstrip("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
    except (SyntaxError, tokenize.TokenError) as error:
        raise BookError(f"{prefix}: not valid Python: {error}") from None
    found: dict[str, Parameter] = {}
    for node in tree.body:
        place = f"{prefix}, line {node.lineno}"
        try:
            parameter = _parameter(node, comments.get(node.end_lineno, ""))
        except BookError as error:
            raise BookError(f"{place}: {error}") from None
        if parameter.name in found:
            raise BookError(f"{place}: {parameter.name} is defined twice")
        found[parameter.name] = parameter
    return found


def _parameter(node: ast.stmt, comment: str) -> Parameter:
    good = "name: type = default  # RANGE unit; description"
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
        raise BookError(f"{ast.unparse(node)!r} is not of the form `{good}`")
    name, kind = node.target.id, ast.unparse(node.annotation)
    if kind not in TYPES:
        raise BookError(f"{name}: type {kind} is not one of {', '.join(TYPES)}")
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        raise BookError(f"{name}: its default {ast.unparse(node.value)} is not a literal") from None
    if not comment:
        raise BookError(f"{name} has no range: write `{good}`, RANGE 4–512, a | b | c or any")
    bounds, rest = _range(name, kind, comment)
    unit, _, description = rest.partition(";")
    parameter = Parameter(
        name, kind, default, unit=unit.strip(), description=description.strip(), **bounds
    )
    try:
        parameter.check(default)
    except BookError as error:
        raise BookError(f"its default: {error}") from None
    if kind == "float":
        parameter = Parameter(**(asdict(parameter) | {"default": float(default)}))
    return parameter


def _range(name: str, kind: str, comment: str) -> tuple[dict, str]:
    """The bounds that a comment begins with, and what follows them."""
    if re.match(r"any(?=[\s;]|$)", comment):
        return {}, comment[3:]
    choices = CHOICES.match(comment)
    if choices:
        bare = Parameter(name, kind, "")
        items = (item.strip().strip("\"'") for item in re.findall(ITEM, choices.group()))
        return {"choices": tuple(bare.parse(item) for item in items)}, comment[choices.end() :]
    span = SPAN.match(comment)
    if span and kind in ("int", "float"):
        low, high = (TYPES[kind](text.replace("−", "-")) for text in span.groups())
        if low > high:
            raise BookError(f"{name}: its range {span.group()} is upside down")
        return {"low": low, "high": high}, comment[span.end() :]
    raise BookError(f"{name}: `{comment}` begins with no range: 4–512, a | b | c or any")


def chosen_values(
    parameters: dict[str, Parameter], profiles: dict, profile: str, typed: list[str]
) -> dict[str, Value]:
    """The value of every parameter: its default, changed by the profile, then by `typed`.

    `typed` holds `name=value` strings. Raises BookError for a profile, name, type or value that
    the chapter does not have or allow.
    """
    values = {name: parameter.default for name, parameter in parameters.items()}
    known = ["default", *(name for name in profiles if name != "default")]
    if profile not in known:
        raise BookError(f"no profile {profile!r} in this chapter{nearest(profile, known)}")
    for name, value in profiles.get(profile, {}).items():
        values[name] = _known(parameters, name, f"profile {profile}: ").check(value)
    seen: set[str] = set()
    for item in typed:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals:
            raise BookError(f"-p {item}: write -p name=value")
        if name in seen:
            raise BookError(f"-p {name} is given twice")
        seen.add(name)
        parameter = _known(parameters, name)
        free = parameter.type == "str" and not parameter.choices
        values[name] = parameter.parse(text if free else text.strip())  # a space may be meant
        if names_a_file(parameter):
            values[name] = _at_home(name, values[name])
    return values


def names_a_file(parameter: Parameter) -> bool:
    """Whether values may be files or folders: `model_name`, or a name in `_file` or `_folder`."""
    named = parameter.name == "model_name" or parameter.name.endswith(("_file", "_folder"))
    return named and parameter.type == "str" and not parameter.choices


def _at_home(name: str, value: str) -> str:
    """A typed path as an absolute one: a chapter runs in another folder than its reader."""
    if "/" not in value and not value.startswith(("~", ".")):
        return value  # the name of a model
    path = Path(value).expanduser()
    if path.exists():
        return str(path.resolve())
    if value.startswith((".", "/", "~")):
        raise BookError(f"parameter {name}: no file or folder {value} in {Path.cwd()}")
    return value  # a hub id


def _known(parameters: dict[str, Parameter], name: str, prefix: str = "") -> Parameter:
    if name not in parameters:
        raise BookError(f"{prefix}no parameter {name!r}{nearest(name, list(parameters))}")
    return parameters[name]
