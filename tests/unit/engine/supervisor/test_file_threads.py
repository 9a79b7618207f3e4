"""The executor of the supervisor's event loop: it runs what it is given, and holds up no end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from forebay.engine.supervisor.file_threads import FileThreads


def test_results_and_errors_come_back() -> None:
    async def use() -> None:
        asyncio.get_running_loop().set_default_executor(FileThreads(2))
        assert await asyncio.gather(*(asyncio.to_thread(divmod, number, 3) for number in range(20))) == [
            divmod(number, 3) for number in range(20)
        ]
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 1, 0)

    asyncio.run(use())


def test_no_more_threads_than_asked_for_and_none_that_is_not_needed() -> None:
    threads = FileThreads(2)
    names = {threads.submit(lambda: threading.current_thread().name).result() for _ in range(5)}
    assert len(names) <= 2
    release, begun = threading.Event(), threading.Barrier(3)

    def hold() -> str:
        begun.wait(60)
        release.wait(60)
        return threading.current_thread().name

    held = [threads.submit(hold) for _ in range(2)]
    begun.wait(60)
    third = threads.submit(lambda: threading.current_thread().name)
    release.set()
    assert {future.result(60) for future in held} == {"files_0", "files_1"}
    assert third.result(60) in ("files_0", "files_1")
    threads.shutdown()


def test_a_process_ends_while_a_thread_hangs() -> None:
    program = (
        "import asyncio, threading\n"
        "from forebay.engine.supervisor.file_threads import FileThreads\n"
        "async def use():\n"
        "    asyncio.get_running_loop().set_default_executor(FileThreads(1))\n"
        "    begun = threading.Event()\n"
        "    hung = asyncio.create_task(asyncio.to_thread(lambda: begun.set() or threading.Event().wait()))\n"
        "    await asyncio.sleep(0)\n"
        "    begun.wait(60)\n"
        "    hung.cancel()\n"
        "asyncio.run(use())\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], timeout=60, check=True)
