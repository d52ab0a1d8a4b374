"""Signals that ask a command to stop, and processes that end with the one that started them.

A command is in one of three states. At first it has nothing to lose: a signal ends it at once, with
one line. Within `noted`, while there is something to put away, a signal is only noted, and looked for
with `check`. Within `interruptible`, inside of that, it raises `Stopped`: for waits that may be long.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows lacks the last two
)
"""What terminals, `timeout`, systemd and schedulers send to end a program."""

LIFELINE = "CLIP_SURGERY_LIFELINE"
"""Environment variable: the descriptor of a pipe that closes when the first process ends."""

_PATIENCE = 1.0  # seconds after which another Ctrl-C is a second one, not an echo of the first


class Stopped(BaseException):
    """A signal asked this process to stop.

    Not an `Exception`: it may come in the middle of a decoder, and nothing may take it for a bad
    sample.
    """

    def __init__(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}")
        self.number = number
        self.code = 130 if number == signal.SIGINT else 143


class _Listener:
    """What one command does when it is asked to stop."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.reason: BaseException | None = None
        self.state = "leave"
        self.numbers: tuple[int, ...] = ()
        self.hand_on: Callable[[int], None] = lambda number: None
        self.since = math.inf
        self._raised = False
        self._leaving = threading.Lock()

    def note(self, number: int) -> None:
        """Take down that a signal came: from any thread, any number of times."""
        if self.reason is None:
            self.reason, self.since = Stopped(number), time.monotonic()
            self.hand_on(number)
        insists = number == signal.SIGINT and time.monotonic() > self.since + _PATIENCE
        if self.state == "leave" or insists:
            self.leave()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals: runs in the main thread, between two steps of Python."""
        self.note(number)
        if self.state == "raise" and not self._raised and self.reason is not None:
            self._raised = True
            raise self.reason

    def take_back(self) -> None:
        """Be the handler again, if another has been put in our place."""
        for number in self.numbers:
            # Lightning puts itself before us, and would wait inside of its handler for a broadcast
            # of all ranks: one that has finished and waits for the others never joins in.
            if signal.getsignal(number) != self.handle:
                signal.signal(number, self.handle)

    def leave(self) -> None:
        """End the process now, from whichever thread, with one line."""
        if self._leaving.acquire(blocking=False):
            reason = self.reason
            hint = "; run again to go on" if isinstance(reason, Stopped) else ""
            if speaks():
                _say(f"{self.command}: {reason}{hint}")
            _let_go()
            os._exit(reason.code if isinstance(reason, Stopped) else 1)


_listener: _Listener | None = None
_lifeline: int | None = None  # the first process's end


def _say(line: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C, or a bar
    os.write(2, f"{start}{line}\n".encode())


@contextmanager
def listening(command: str, *, install: bool = True) -> Iterator[None]:
    """Let signals stop what is done inside.

    Signals that are ignored already stay so: `nohup` and shells want it.

    Args:
        command: what a line about a stop begins with.
        install: whether the process is this command's own, so that its signals are too; it ignores
            them once this is over.
    """
    global _listener
    before, _listener = _listener, _Listener(command)
    try:
        if install:
            with _handlers(_listener):
                yield
        else:
            _listener.state = "note"
            yield
    finally:
        _listener = before


@contextmanager
def _handlers(listener: _Listener) -> Iterator[None]:
    """Handlers for the main thread, and a thread for when that one is deep in foreign code."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(end is ours)

    def listen() -> None:
        while received := ours.recv(64):
            for number in received:
                if number in STOP:
                    listener.note(number)

    heeded = tuple(n for n in STOP if signal.getsignal(n) is not signal.SIG_IGN)
    listener.numbers = heeded
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        for number in heeded:
            signal.signal(number, listener.handle)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)  # see `blocked`
        yield
    finally:
        for number in heeded:
            # What was to be done is done. Python takes a while to end, and would complain of Ctrl-C.
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(descriptor)
        theirs.shutdown(socket.SHUT_WR)  # not only closed: processes started meanwhile hold it too
        thread.join()
        theirs.close()
        ours.close()


def only_note() -> None:
    """From now on, only note signals: there is something to put away before the process may end."""
    if _listener is not None:
        _listener.state = "note"
        _listener.take_back()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal raise `Stopped` meanwhile, also one that was noted before."""
    listener = _listener
    if listener is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, listener.state = listener.state, "raise"
    try:
        listener.take_back()
        check()
        yield
    finally:
        listener.state = before


def reason() -> BaseException | None:
    """Why to stop, if that was asked for: `Stopped`, or what another process of the run met."""
    return _listener.reason if _listener is not None else None


def check() -> None:
    """Stop here, if that was asked for.

    Raises:
        Stopped: a signal came.
    """
    why = reason()
    if why is not None:
        raise why


def hand_on(deliver: Callable[[int], None]) -> None:
    """Call ``deliver`` with the number of the first signal that comes."""
    if _listener is not None:
        _listener.hand_on = deliver


def interrupt(reason: BaseException) -> None:
    """From a thread: stop the main one for ``reason``, as a signal would."""
    if _listener is not None and _listener.reason is None:
        _listener.reason = reason
        if _listener.numbers:
            signal.pthread_kill(threading.main_thread().ident or 0, _listener.numbers[-1])


def leave() -> None:
    """From a thread: end this process now, for what `interrupt` told it, whatever it is doing."""
    if _listener is not None and _listener.numbers:
        _listener.leave()


def speaks() -> bool:
    """Whether this process tells the user what happens: the first of several."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return not any(rank.strip("0") for rank in ranks)


# Processes started from here


def open_lifeline() -> int:
    """In the first process of a run: a pipe that closes when this process ends, whatever ends it.

    Returns:
        The descriptor that the others read from, see `attend_first`.
    """
    global _lifeline
    end, _lifeline = os.pipe()
    return end


def attend_first() -> None:
    """In a process that the first one of a run started: end when that one does."""
    descriptor = os.environ.pop(LIFELINE, "")
    if not descriptor:
        return
    os.set_inheritable(int(descriptor), False)

    def wait() -> None:
        told = os.read(int(descriptor), 1)
        if not told and os.environ.get("LOCAL_RANK") == "1":
            _say(
                "lightning predict: the first process of the run was killed, often for lack of memory. "
                "Finished shards are kept: run the same command again to go on"
            )

    end_after(wait)


def _let_go() -> None:
    """Let the others end without a word of theirs."""
    if _lifeline is not None:
        with suppress(OSError):  # they have ended already
            os.write(_lifeline, b"." * 1024)  # one for each of them


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back meanwhile, here and from their first line on in processes started here."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*, but: tuple[int, ...] = ()) -> None:
    """In a process that multiprocessing started: ignore signals, and end when its parent does.

    Args:
        but: signals that keep their effect.
    """
    import multiprocessing  # only here: every command would wait for it

    for number in STOP:
        signal.signal(number, signal.SIG_DFL if number in but else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_after(parent.join)


def end_after(wait: Callable[[], object]) -> None:
    """End this process as soon as ``wait`` returns."""

    def watch() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _forget() -> None:
    # A forked process has none of the threads, and none of the duties, of the one it came from.
    global _listener, _lifeline
    if _lifeline is not None:  # the others shall not wait for this process too
        os.close(_lifeline)
        _lifeline = None
    if _listener is not None:
        for number in _listener.numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        _listener = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
