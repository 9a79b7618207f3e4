"""Repository agents: what is done with a model's directory before it is loaded (spec R-126, C-019).

Triton's agents are C libraries, which cannot be loaded here. The one that it ships, ``checksum``, is built in; a model
that asks for another is not served, with Triton's sentence, but for the directory that it searched: whoever has files
checked wants no server to skip that.
"""

from __future__ import annotations

from collections.abc import Iterator

from forebay.engine.repository.beneath import Beneath, Refused, check_relative
from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.model_config_schema import FieldPath, ModelConfig
from forebay.ipc.errors import Code, NotFound

CHECKSUM = "checksum"

_AGENTS: FieldPath = ("model_repository_agents", "agents")


class RepositoryAgents:
    """Runs the agents of models. Calls may come from any thread."""

    def __init__(self) -> None:
        #: File's identity to its MD5, as hexadecimal digits: a poll does not read large models again and again.
        self._digests: dict[tuple[str, int, int, int], str] = {}

    def problems(self, config: ModelConfig, root: Beneath, model: tuple[str, ...]) -> list[Problem]:
        """Run the agents that a configuration lists.

        Args:
            model: the model's directory below ``root``.

        Returns:
            Why the model may not be loaded; empty if nothing speaks against it.
        """
        found: list[Problem] = []
        for index, agent in enumerate(config.message.model_repository_agents.agents):
            path = (*_AGENTS, index)
            if agent.name == CHECKSUM:
                parameters: dict[str, str] = dict(agent.parameters)
                found += self._check_sums(parameters, root, model, (*path, "parameters"))
            else:
                found.append(
                    Problem(
                        f"unable to find 'libtritonrepoagent_{agent.name}.so' for repo agent '{agent.name}'",
                        (*path, "name"),
                        written=agent.name,
                        possible=(CHECKSUM,),
                        hint="Agents are part of forebay; those written in C cannot be loaded.",
                    )
                )
        return [problem.located(config.source) for problem in found]

    def _check_sums(
        self, expected: dict[str, str], root: Beneath, model: tuple[str, ...], path: FieldPath
    ) -> Iterator[Problem]:
        """Compare files with the sums of ``<algorithm>:<file>`` parameters (checksum.cc of Triton's agent)."""
        for key, wanted in sorted(expected.items()):
            algorithm, colon, name = key.partition(":")
            if not colon:
                yield Problem(f"failed to parse key: {key}", (*path, key))
                continue
            if algorithm.lower() != "md5":
                text = f"Unsupported checksum algorithm: {algorithm}"
                yield Problem(text, (*path, key), code=Code.UNSUPPORTED)
                continue
            try:
                got = self._md5(root, (*model, *check_relative(name)))
            except (NotFound, Refused) as error:
                yield Problem(f"failed to open text file for read {name}: {_reason(error)}", (*path, key))
                continue
            if got != wanted:
                yield Problem(f"Mismatched MD5 hash for file {name}, expect: {wanted}, got: {got}", (*path, key))

    def _md5(self, root: Beneath, path: tuple[str, ...]) -> str:
        """Return a file's MD5.

        Raises:
            NotFound: there is no such file.
            Refused: a link leads out of the repository.
        """
        entry = root.entry(path)
        if entry is None:
            raise NotFound("No such file or directory")
        identity = (root.real_path(path), entry.mtime_ns, entry.size_bytes, entry.inode)
        digest = self._digests.get(identity)
        if digest is None:
            digest = root.md5(path)
            self._forget(identity[0])
            self._digests[identity] = digest
        return digest

    def _forget(self, real_path: str) -> None:
        """Drop the sums of a file as it was before."""
        for identity in [identity for identity in list(self._digests) if identity[0] == real_path]:
            self._digests.pop(identity, None)


def _reason(error: NotFound | Refused) -> str:
    return error.text.rpartition(": ")[2]
