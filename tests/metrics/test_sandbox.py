"""The sandbox against programs that mean harm, lie, or break; each test is bounded by itself."""

import math
import os
import resource
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_lightning.metrics import sandbox, sandbox_child, sandbox_system
from sst_lightning.metrics.sandbox import (
    Limits,
    Program,
    ProgramResult,
    SandboxError,
    isolation,
    require_sandbox,
    run_program,
    run_programs,
)
from sst_lightning.metrics.sandbox_values import dump_line, load_line, pack
from tests.bounded import bounded

TEST = "def check(candidate):\n    assert candidate(1) == 2\n"
SHORT = Limits(cpu_seconds=1, wall_seconds=30.0)

# Programs that never end would end by themselves, should the sandbox not stop them.
ENDLESS = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


@pytest.fixture(autouse=True)
def _bounded():
    """No test here may hang, whatever the sandbox does."""
    with bounded(90):
        yield


@pytest.fixture
def _sandbox():
    """Skips where there is no sandbox; one that has a hole is tested, and fails."""
    try:
        isolation()
    except SandboxError as error:
        pytest.skip(str(error))
    if os.geteuid() == 0 and not sandbox_child.is_mapped(sandbox_child.NOBODY):
        pytest.skip("root in a user namespace without other users: nothing bounds its processes")


in_sandbox = pytest.mark.usefixtures("_sandbox")


def run(code: str, limits: Limits = SHORT, test: str = TEST) -> ProgramResult:
    return run_program(Program(code=code, entry_point="f", test=test), limits)


def returning(lines: str) -> str:
    return "def f(x):\n" + "".join(f"    {line}\n" for line in lines.splitlines())


@in_sandbox
def test_everything_is_isolated():
    assert isolation() == dict.fromkeys(
        ("user", "processes", "files", "network", "environment"), True
    )


@in_sandbox
@pytest.mark.parametrize("folder", ["/", "/tmp", "/usr"])
def test_working_directory_of_the_caller_does_not_matter(monkeypatch, folder):
    monkeypatch.chdir(folder)
    isolation.cache_clear()
    require_sandbox()


@in_sandbox
def test_right_and_wrong_programs():
    assert run(returning("return x + 1")).passed
    assert run(returning("return x")) == ProgramResult("failed", "")
    assert run(returning("return 1 / 0")).detail == "ZeroDivisionError: division by zero"
    assert run("def f(x):").status == "error"
    assert run("def g(x):\n    return 2").detail.startswith("NameError")


@pytest.mark.slow
@in_sandbox
def test_endless_loop():
    assert run(returning(ENDLESS)).status == "timeout"


@in_sandbox
def test_sleeping_program():
    start = time.monotonic()
    result = run("import time\n" + returning("time.sleep(80)"), Limits(wall_seconds=1.0))
    assert result.status == "timeout"
    assert time.monotonic() - start < 9  # the sandbox would end by itself at 11


@pytest.mark.slow
@in_sandbox
def test_busy_program_with_much_wall_clock_is_stopped_by_its_cpu_time():
    result = run(returning(ENDLESS), Limits(cpu_seconds=1, wall_seconds=80.0))
    assert "CPU" in result.detail


@pytest.mark.slow
@in_sandbox
def test_fork_bomb():
    # Six generations at most, and every process ends.
    bomb = returning(
        "import os, time\nend = time.monotonic() + 60\ngeneration = 0\n"
        "while time.monotonic() < end:\n    try:\n"
        "        if generation < 6: generation += 1 if os.fork() == 0 else 2\n"
        "    except OSError:\n        pass"
    )
    assert run(bomb).status == "timeout"
    assert run(bomb, Limits(processes=8, cpu_seconds=1, wall_seconds=3.0)).status == "timeout"


@in_sandbox
def test_limit_on_processes_is_exact_and_none_is_left():
    name = f"bomb{os.getpid()}"
    code = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
def f(x):
    started = 0
    while started < 20:
        try:
            child = os.fork()
        except OSError:
            break
        if child == 0:
            os.setsid()
            time.sleep(80)
        started += 1
    return started
"""
    test = "def check(candidate):\n    assert candidate(1) == 4\n"
    assert run(code, Limits(processes=5), test).passed
    deadline = time.monotonic() + 5
    while (left := _processes_named(name)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def _processes_named(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(str(path))
        except OSError:  # it has ended since
            continue
    return found


@in_sandbox
@pytest.mark.parametrize(
    "hog",
    [
        "return bytearray(10**11)",
        "held = []\nfor _ in range(2000): held.append(bytearray(1 << 20))",
        "return ['1' * 9] * 10**9",
    ],
)
def test_memory_hog(hog):
    # KiB, of the largest child that this process ever had: another test may have had larger ones.
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = run(returning(hog), Limits(memory_bytes=200 << 20))
    assert result.status == "out_of_memory"
    # 200 MiB were allowed.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 1 << 20)


@in_sandbox
def test_memory_outside_the_address_space_is_denied():
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
def f(x):
    try:
        os.memfd_create("m")
    except PermissionError:
        return 2 if libc.shmget(0, 4096, 0o1600) == -1 else 0
"""
    assert run(code).passed


@pytest.mark.slow
@in_sandbox
@pytest.mark.parametrize("stream", [1, 2])
def test_program_that_prints_forever(stream):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = (
        f"import os\ndef f(x):\n    for _ in range(10**7): os.write({stream}, b'passed' * 10000)\n"
    )
    assert run(code).status == "timeout"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


@pytest.mark.slow
@in_sandbox
def test_answer_without_end():
    assert (
        run(returning("import os\nfor _ in range(10**4): os.write(4, b'1' * 65536)")).status
        == "exited"
    )
    assert run(returning("return 'x' * 10**7")).status == "exited"
    assert run(returning("for i in range(10**9): yield i")).status in ("timeout", "out_of_memory")


@in_sandbox
def test_file_deleter(tmp_path):
    """It goes for a folder made for it; the interpreter's files it only opens for writing."""
    kept = tmp_path / "kept"
    kept.write_text("here")
    code = f"""
import errno, os, shutil
def f(x):
    shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
    refused = 0
    for path in (os.__file__, "/new"):
        try:
            open(path, "a").close()
        except OSError as error:
            refused += error.errno in (errno.EROFS, errno.EACCES)
    return refused
"""
    assert run(code, Limits()).passed
    assert kept.read_text() == "here"


@in_sandbox
def test_working_directory_is_empty_writable_small_and_gone_afterwards():
    name = f"written{os.getpid()}"
    code = f"""
import os
def f(x):
    assert os.listdir() == []
    with open({name!r}, "w") as file:
        file.write("x")
    return len(os.listdir()) + 1
"""
    assert run(code).passed
    assert run(code).passed
    assert not Path("/tmp", name).exists()
    fill = returning("file = open('big', 'wb')\nfor _ in range(99): file.write(bytes(1 << 20))")
    assert "Errno 27" in run(fill, Limits()).detail  # EFBIG
    many = returning("for i in range(999): open(str(i), 'wb').write(bytes(1 << 17))")
    assert "Errno 28" in run(many, Limits()).detail  # ENOSPC


@in_sandbox
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, timeout=5).close()
        code = f"import socket\ndef f(x):\n    socket.create_connection({address!r}, 5)\n"
        assert run(code).detail.startswith("PermissionError")


@in_sandbox
def test_nothing_is_inherited(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = """
import os
def f(x):
    inherited = []
    for descriptor in range(5, 100):
        try:
            os.fstat(descriptor)
            inherited.append(descriptor)
        except OSError:
            pass
    return [inherited, "SECRET_TOKEN" in os.environ, os.getuid() == 0]
"""
        test = "def check(candidate):\n    assert candidate(1) == [[], False, False]\n"
        assert run(code, test=test).passed


LIES = {
    "equal to everything": "class A:\n    def __eq__(self, other): return True\n"
    "def f(x): return A()",
    "whole number equal to everything": "class A(int):\n    def __eq__(self, other): return True\n"
    "def f(x): return A(7)",
    "exit with success in the function": "import os\ndef f(x): os._exit(0)",
    "exit with success at once": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "prints the verdict": "import os\nfor i in (1, 2, 3, 4):\n"
    '    try: os.write(i, b\'{"status": "passed", "detail": ""}\\n\')\n'
    "    except OSError: pass\ndef f(x): return 3",
    "no assertions": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
    "import sys\nsys.excepthook = lambda *a: None\ndef f(x): return 3",
    "another check": "def check(candidate): pass\nimport sys\n"
    "sys.modules['__main__'].check = check\ndef f(x): return 3",
    "looks at its callers": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        if 'candidate' in frame.f_locals: return 2\n        frame = frame.f_back\n    return 3",
    "kills the tester": "import os\nassert not os.path.exists('/proc')\ndef f(x):\n"
    "    for number in range(1, 65):\n"
    "        try: os.kill(1, number)\n        except OSError: pass\n    return 3",
    "traces the tester": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "def f(x): return 2 if libc.ptrace(16, 1, 0, 0) == 0 else 3",
    "closes its answers": "import os\nos.close(4)\ndef f(x): return 2",
    "stays after closing its answers": "import os\ndef f(x):\n    os.close(4)\n"
    "    for i in range(10**10): pass",
    "answers in nested brackets": "import os\ndef f(x):\n    os.write(4, b'[' * 60000 + b'\\n')",
}


@in_sandbox
@pytest.mark.parametrize("lie", LIES)
def test_lie(lie):
    assert not run(LIES[lie]).passed


@in_sandbox
def test_programs_crash_and_run_out_of_stack():
    crash = run("import ctypes\ndef f(x): ctypes.string_at(0)")
    assert crash == ProgramResult("exited", "ended without an answer (exit code -11)")
    assert "RecursionError" in run("def f(x): return f(x)").detail


@in_sandbox
def test_large_numbers():
    test = "def check(candidate):\n    assert candidate(10**5000) == 10**5000 + 1\n"
    assert run(returning("return x + 1"), test=test).passed


@in_sandbox
def test_arguments_are_the_test_s_own():
    test = "def check(candidate):\n    a = [1]\n    candidate(a)\n    assert a == [1]\n"
    assert run("def f(x): x.clear()", test=test).passed


@in_sandbox
def test_test_may_use_what_the_task_gives_and_not_what_the_program_makes_of_it():
    program = Program(
        code="def double(x): return 0\ndef f(x): return 0",
        entry_point="f",
        given="def double(x): return 2 * x\n",
        test="def check(candidate):\n    assert double(f(1)) == 2\n",
    )
    assert run_program(program).status == "failed"


@in_sandbox
def test_order_of_sets_does_not_depend_on_the_run():
    code = returning("raise ValueError(list({str(i) for i in range(50)}))")
    assert run(code) == run(code)


@pytest.mark.slow
@in_sandbox
def test_many_programs_keep_their_order():
    codes = [returning(f"sum(range({10**5 * (i % 3)}))\nreturn x + {i % 2}") for i in range(34)]
    programs = [Program(code=code, entry_point="f", test=TEST) for code in codes]
    results = run_programs(programs, workers=3)
    assert [result.passed for result in results] == [bool(i % 2) for i in range(34)]


@in_sandbox
@pytest.mark.parametrize("test", ["def chek(candidate): pass", "def check(", "1 / 0"])
def test_broken_test_is_no_verdict(test):
    with pytest.raises(SandboxError, match="f: the tests cannot be run"):
        run(returning("return 2"), test=test)


def test_refusal_where_namespaces_are_forbidden():
    """As in a container: the filter of system calls, loaded into a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sandbox_system.control("", sandbox_system.PR_SET_NO_NEW_PRIVS, 1)
            sandbox_system.filter_system_calls()
            isolation.cache_clear()
            require_sandbox()
            os.write(write, b"no error")
        except SandboxError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(child, 0)
    assert "unshare: Operation not permitted" in message
    assert "seccomp=unconfined" in message


def test_refusal_on_another_system(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="no sandbox on darwin"):
        run(returning("return 2"))


@pytest.mark.parametrize("name", ["cpu_seconds", "wall_seconds", "memory_bytes", "processes"])
def test_limit_of_nothing(name):
    with pytest.raises(SandboxError, match=f"limit {name} is 0. Set it above 0"):
        Limits(**{name: 0})


def test_refusal_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: {"network": False, "files": True})
    with pytest.raises(SandboxError, match="cannot be isolated: network"):
        require_sandbox()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=200)
def test_plain_values_arrive_as_they_were(value):
    arrived = load_line(dump_line(value))
    assert (
        repr(arrived) == repr(value) or arrived == value
    )  # NaN equals nothing; sets have no order
    assert type(arrived) is type(value)


def test_other_values():
    class Sub(dict):
        def __eq__(self, other):
            return True

        __hash__ = None

    arrived = load_line(dump_line(Sub(a=1)))
    assert type(arrived) is dict
    assert arrived == {"a": 1}
    assert load_line(dump_line(range(3))) == range(3)
    assert load_line(dump_line(1j)) == 1j
    assert math.copysign(1, load_line(dump_line(-0.0))) == -1
    generated = load_line(dump_line(i for i in range(3)))
    assert generated != [0, 1, 2]
    assert list(generated) == [0, 1, 2]
    assert load_line(dump_line(len)) != load_line(dump_line(len))
    assert pack(len) == {"opaque": "builtin_function_or_method"}


@pytest.mark.parametrize("line", [b"{}", b'{"unknown": 1}', b'{"value": 2}', b"[", b'{"dict": 3}'])
def test_what_is_no_value(line):
    with pytest.raises(ValueError, match=r"\w"):
        load_line(line)
