"""The limits of one step, from the user's words to the kernel's files, and to what the user is told of them.

Runs in the agent, as root. The syntax is limits.py's, the files are cgroup.py's, the texts are errors.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from enclos.runtime import cgroup, errors, limits
from enclos.runtime.policy import Decision

OPTION = "--container-limit"

Row = tuple[str, str, str]
"""A limit of ours that is in force: file, subject in messages, field of the file. Kept in the step's record."""


class StepLimits:
    """What the user and the site want for a step."""

    def __init__(self, decision: Decision) -> None:
        self._wanted = decision.limits
        self._site = decision.site_limits
        self._oom_group = decision.oom_group

    @property
    def needed(self) -> bool:
        return bool(self._wanted or self._site)

    def check(self) -> None:
        """What can be said before the first task is there: a node without cgroup v2 cannot limit anything.

        Raises:
            EnclosError: no_cgroup2.
        """
        if self.needed and not cgroup.is_cgroup2():
            raise errors.no_cgroup2(self._subject((*self._wanted, *self._site)[0]))

    def apply(self, directory: str, within: str = "") -> list[Row]:
        """Set the limits on the step's cgroup; called when Slurm has set its own.

        Args:
            within: another cgroup whose limits hold as well, though the step's is not below it.

        Returns:
            Those that tighten anything.

        Raises:
            EnclosError: limit_above_grant, limit_unsupported, limit_no_device, limit_refused.
        """
        if not self.needed:
            return []
        try:
            held = cgroup.held(within) if within else []
            made = cgroup.tighten(directory, self._wanted, [*held, *self._site], within)
            made = [limit for limit in made if limit not in held]
        except cgroup.Refused as fact:
            raise self._word(fact) from fact
        rows = [(limit.file, self._subject(limit), limit.field) for limit in made]
        if self._oom_group and any(limit.file == "memory.max" for limit in made):
            cgroup.set_oom_group(directory)
        return rows

    def _subject(self, limit: limits.Limit) -> str:
        return f"{OPTION}={limit.text}" if limit in self._wanted else f"the site's limit {limit.text}"

    def _word(self, fact: cgroup.Refused) -> errors.EnclosError:
        subject = self._subject(fact.limit)
        match fact.kind:
            case "above":
                return errors.limit_above_grant(subject, fact.detail)
            case "no controller":
                return errors.limit_unsupported(subject, fact.detail)
            case "no device":
                return errors.limit_no_device(subject, fact.detail)
            case _:
                return errors.limit_refused(subject, fact.detail)


def news(directory: str, rows: Iterable[Sequence[str]]) -> list[errors.EnclosError]:
    """Which limits of ours have killed or refused something, in words; mostly none.

    Only what happened at the step's own cgroup counts: Slurm words what its limits on the job did.
    """
    found = []
    subjects = {}
    for file, subject, *field in rows:  # An older agent's record has no field.
        subjects[file] = subject
        if file.startswith("hugetlb.") and (count := cgroup.refused_huge_pages(directory, file)):
            found.append(errors.limit_refused_huge_pages(subject, count))
        if file == "rdma.max" and (count := cgroup.refused_rdma(directory, "".join(field))):
            found.append(errors.limit_refused_rdma(subject, count))
    if not subjects.keys() & {"memory.max", "pids.max"}:
        return found
    happened = cgroup.events(directory)
    if happened.killed and "memory.max" in subjects:
        found.append(errors.limit_killed(subjects["memory.max"], happened.killed))
    if happened.refused_forks and "pids.max" in subjects:
        found.append(errors.limit_refused_forks(subjects["pids.max"], happened.refused_forks))
    return found
