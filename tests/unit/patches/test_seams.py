"""The register of what is replaced or relied on inside mitmproxy, held against the mitmproxy that is installed."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import eoepca_security
from eoepca_security.proxy import patches
from eoepca_security.proxy.patches import seams
from eoepca_security.proxy.patches.seams import EARLY, LATE, ROWS, Moved, Row

PACKAGE = Path(eoepca_security.__file__).parent
ALL = (*EARLY, *ROWS, *LATE)

# In a process of its own, where nobody has replaced anything yet.
ON_MITMPROXY = """
import dis, inspect, sys
from types import FunctionType, ModuleType
from eoepca_security.proxy.patches import seams
assert not {"mitmproxy", "tornado", "h11", "wsproto"} & set(sys.modules)

def plain(function):
    return inspect.unwrap(getattr(function, "__func__", function))

def instructions(code):
    yield from dis.get_instructions(code)
    for value in code.co_consts:
        if inspect.iscode(value):
            yield from instructions(value)

def looks_up(function, owner, name):
    before = None
    for instruction in instructions(function.__code__):
        if instruction.argval == name:
            if not isinstance(owner, ModuleType):
                if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "LOAD_SUPER_ATTR"):
                    return True
            elif instruction.opname == "LOAD_GLOBAL" and function.__globals__ is vars(owner):
                return True
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and function.__globals__.get(before) is owner:
                return True
        before = instruction.argval
    return False

def stores(function, name):
    return any(i.opname == "STORE_ATTR" and i.argval == name for i in instructions(function.__code__))

rows = (*seams.EARLY, *seams.ROWS, *seams.LATE)
for row in rows:
    if wrong := seams._wrong(row):
        print(row.file, wrong)
        continue
    owner = seams._find(row.owner)
    for user in row.users:
        function = seams._find(user if ":" in user else row.owner.partition(":")[0] + ":" + user)
        if not looks_up(plain(function), owner, row.name):
            print(row.file, row.owner, row.name, "is not looked up by", user)
    places = inspect.getmro(owner) if inspect.isclass(owner) else (owner,)
    if not any(row.name in vars(place) for place in places) and not row.users:
        makers = [vars(place).get("__init__") for place in places]
        if not any(stores(plain(maker), row.name) for maker in makers if isinstance(maker, FunctionType)):
            print(row.file, row.owner, row.name, "is not set by a constructor")
seams.check()
print(len(rows), "rows")
"""

DOCTORED = """
import functools

def passed_on(function):
    @functools.wraps(function)
    def wrapper(self, *arguments, **more):
        return function(self, *arguments, **more)

    return wrapper

class Thing:
    size = 3

    def __init__(self, context):
        self.buf = b""

    @passed_on
    def handle(self, event, *, reuse=True):
        return self.helper(event)

    @classmethod
    def make(cls, status=200):
        return [Thing(number) for number in range(status)]

def use():
    return Thing(None)
"""


def test_every_row_holds_on_this_mitmproxy_and_ours_is_what_its_code_finds() -> None:
    command = [sys.executable, "-c", ON_MITMPROXY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""
    assert result.stdout == f"{len(ALL)} rows\n"


def test_the_register_knows_files_that_exist_and_each_name_once_for_each_of_them() -> None:
    assert len(ALL) == len({(row.file, row.owner, row.name) for row in ALL}) > 150
    for row in ALL:
        assert (PACKAGE / "proxy" / row.file).is_file(), row


def test_what_is_replaced_in_a_module_names_who_looks_it_up_there() -> None:
    calls = [
        node
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "seams.replace"
    ]
    names = {ast.literal_eval(call.args[1]) for call in calls}
    assert {"HttpStream", "Http1Client", "ChunkedReader", "ProxyConnectionHandler"} <= names
    for row in ROWS:
        assert row.users or row.name not in names or ":" in row.owner, row


def test_the_remedy_is_the_version_that_is_tested() -> None:
    assert metadata.version("mitmproxy") == seams.TESTED


def subclasses() -> list[tuple[type, list[type]]]:
    """Return our classes in `patches` that have bases of others, with these."""
    found = []
    for module in pkgutil.iter_modules(patches.__path__, f"{patches.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name:
                ours = ("eoepca_security", "builtins", "typing")
                others = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ours]
                if others:
                    found.append((kind, others))
    return found


def test_what_we_override_is_there_with_the_same_parameters_and_in_the_register() -> None:
    overridden = set()
    owners = {row: seams._find(row.owner) for row in ROWS if ":" in row.owner}
    for kind, others in subclasses():
        for name, ours in vars(kind).items():
            theirs = next((vars(base)[name] for base in others if name in vars(base)), None)
            # What dataclass() makes does not come from our file.
            is_written = isinstance(ours, FunctionType) and ours.__code__.co_filename == inspect.getfile(kind)
            if theirs is None or not is_written:
                continue
            takes_all = any(given.kind is given.VAR_POSITIONAL for given in inspect.signature(ours).parameters.values())
            assert takes_all or seams.signature_of(ours) == seams.signature_of(theirs), (kind, name)
            assert any(row.name == name and issubclass(kind, owner) for row, owner in owners.items()), (kind, name)
            overridden.add((kind.__name__, name))
    assert {("_Http2Client", "_handle_event2"), ("Stream", "send_response")} <= overridden
    assert len(overridden) > 25


def test_what_calls_super_is_in_the_base() -> None:
    for kind, others in subclasses():
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()":
                assert any(hasattr(base, node.attr) for base in others), (kind, node.attr)


def replacements(tree: ast.AST) -> list[str]:
    """Return the statements that change what belongs to a module that is not ours."""
    theirs = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("eoepca_security"))
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "__setattr__", "delattr")):
            found.append(ast.unparse(node))
        single = (one for given in targets for one in (given.elts if isinstance(given, ast.Tuple) else [given]))
        for target in (one for one in single if isinstance(one, ast.Attribute)):
            root: ast.expr = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if target.attr == "__class__" or (isinstance(root, ast.Name) and root.id in theirs):
                found.append(ast.unparse(node))
    return found


def test_nothing_is_replaced_but_through_the_register() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "seams.py"]
    assert len(files) > 50
    for file in files:
        assert replacements(ast.parse(file.read_text())) == [], file


@pytest.mark.parametrize(
    "code",
    [
        "from mitmproxy.proxy.layers import http\nhttp.HttpStream = Stream",
        "from mitmproxy.proxy.layers import http as layers\nlayers.HttpStream.flow_done = None",
        "import mitmproxy.certs\nmitmproxy.certs.load_pem_private_key, other = 1, 2",
        "import ssl\ndef install():\n    ssl.SSLContext.load_default_certs = None",
        "from mitmproxy.http import Headers\nsetattr(Headers, 'get', get)",
        "def install(master):\n    master.addons.__class__ = Other",
        "import h11\ndel h11.Data",
    ],
)
def test_a_replacement_past_the_register_is_found(code: str) -> None:
    assert len(replacements(ast.parse(code))) == 1


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Give a function that puts a module of mitmproxy's in place, with a change to its code."""
    monkeypatch.setattr(seams, "_checked", set())

    def put(before: str = "", after: str = "") -> ModuleType:
        module = ModuleType("mitmproxy.doctored")
        assert before in DOCTORED
        exec(DOCTORED.replace(before, after, 1), vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return put


def row(owner: str, name: str, *signatures: str, users: tuple[str, ...] = ()) -> Row:
    return Row("patches/some.py", f"mitmproxy.doctored{owner}", name, signatures, users)


THING = row("", "Thing", "(context)", users=("use", "Thing.make"))
HANDLE = row(":Thing", "handle", "(self, event, *, reuse=True)")
MAKE = row(":Thing", "make", "(cls)", "(cls, status=200)")
HELPER = row(":Thing", "helper", users=("Thing.handle",))
SIZE = row(":Thing", "size")
BUF = row(":Thing", "buf")


def test_a_module_that_is_as_it_should_be_passes(doctor: Callable[..., ModuleType]) -> None:
    doctor()
    seams.check((THING, HANDLE, MAKE, HELPER, SIZE, BUF))


@pytest.mark.parametrize(
    ("moved", "before", "after", "wrong"),
    [
        pytest.param(THING, "class Thing", "class Other", "doctored.Thing is gone", id="class gone"),
        pytest.param(HANDLE, "def handle", "def handle2", "doctored.Thing.handle is gone", id="method gone"),
        pytest.param(HANDLE, "class Thing", "class Other", "doctored.Thing.handle is gone,", id="its class gone"),
        pytest.param(SIZE, "size = 3", "", "doctored.Thing.size is gone", id="attribute gone"),
        pytest.param(BUF, "self.buf", "self.buffer", "doctored.Thing.buf is gone", id="attribute of instances gone"),
        pytest.param(
            THING, "context)", "context, conn)", "Thing takes (context, conn), not (context)", id="other parameters"
        ),
        pytest.param(HANDLE, "reuse=True", "reuse=False", "handle takes (self, event, *, reuse=False)", id="default"),
        pytest.param(HANDLE, "*, ", "", "handle takes (self, event, reuse=True), not (self, event, *,", id="kind"),
        pytest.param(
            MAKE, "status=200", "status=object()", "takes (cls, status=Ellipsis), not (cls) or (cls, st", id="several"
        ),
        pytest.param(THING, "Thing(None)", "make(None)", "doctored.Thing is not what use uses", id="not looked up"),
        pytest.param(
            THING, "number) for", "number) if Thing else 0 for", "is not what use uses", id="looked up as another's"
        ),
        pytest.param(THING, "def use", "def use2", "doctored.Thing is gone, or is something else (mod", id="user gone"),
        pytest.param(THING, "def use():", "class use:\n  def make(self):", "or is something else", id="user a class"),
        pytest.param(
            HANDLE, "@passed_on\n    def handle", "handle = 3\n    def _", "else (3 is not a call", id="a value"
        ),
        pytest.param(HELPER, "self.helper", "", "doctored.Thing.helper is not what Thing.handle uses", id="not called"),
    ],
)
def test_what_has_moved_is_told_in_a_line(
    doctor: Callable[..., ModuleType], moved: Row, before: str, after: str, wrong: str
) -> None:
    module = doctor(before, after)
    if before == "number) for":  # a function of the same name that has another module's names
        vars(module)["use"] = FunctionType(vars(module)["use"].__code__, {"Thing": None})
    with pytest.raises(Moved) as raised:
        seams.check((moved,))
    line = str(raised.value)
    assert line.startswith(f"mitmproxy {metadata.version('mitmproxy')}: mitmproxy.doctored")
    assert wrong in line
    assert ", which eoepca_security/proxy/patches/some.py needs: install mitmproxy " in line
    assert "\n" not in line


def test_other_packages_are_told_with_their_versions(doctor: Callable[..., ModuleType]) -> None:
    version = metadata.version("mitmproxy")
    for owner, whose in (
        ("h11._readers", f"h11 {metadata.version('h11')} under mitmproxy {version}: h11._readers.Gone is gone"),
        ("ssl:SSLContext", f"ssl of Python {sys.version_info[0]}.{sys.version_info[1]} under mitmproxy {version}: ssl"),
        ("mitmproxy.no_such_module", f"mitmproxy {version}: mitmproxy.no_such_module.Gone is gone, or is something"),
    ):
        with pytest.raises(Moved, match=re.escape(whose)):
            seams.check((Row("patches/some.py", owner, "Gone", ("()",), ()),))


def test_a_replacement_needs_all_rows_to_hold(
    doctor: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = doctor()
    whole = module.Thing
    gone = row("", "gone", "()")
    monkeypatch.setattr(seams, "_REPLACEABLE", {(THING.owner, "Thing"): (THING, gone)})
    with pytest.raises(Moved, match="gone"):
        seams.replace(THING.owner, "Thing", int)
    assert module.Thing is whole


def test_a_replacement_gives_back_what_stood_there_and_needs_a_row(
    doctor: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = doctor()
    whole, kind = module.Thing, row(":Thing", "__class__")
    monkeypatch.setattr(seams, "_REPLACEABLE", {(given.owner, given.name): (THING, kind) for given in (THING, kind)})
    other, one, another = type("Other", (whole,), {}), whole(None), whole(None)
    assert seams.replace(kind.owner, "__class__", other, of=one) is whole
    assert (type(one), type(another)) == (other, whole)
    assert seams.replace(THING.owner, "Thing", other) is whole
    assert module.use().__class__ is other
    with pytest.raises(KeyError):
        seams.replace(THING.owner, "use", print)
    # What was checked stays so: ours may take other parameters.
    seams.replace(THING.owner, "Thing", int)
    seams.replace(THING.owner, "Thing", whole)
