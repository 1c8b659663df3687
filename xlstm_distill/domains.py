"""The first stage of a run: the text of every domain, sampled, read, cleaned and encoded.

A domain is done when its token data stand. A batch of documents that the teacher writes is a file,
so that a stopped run goes on with the next one; the reading of files stops between two documents,
and is begun anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import sources
from .cleaning import Collection, Contamination, read_hashes
from .data import MANIFEST, from_sources
from .errors import UserError
from .evaluate import passages, questions
from .json_files import read_json
from .recipe import DomainSection, SampledSource, Source, derived_seed
from .sampling import read_documents, sample_documents
from .sources import Document, Watch
from .texts import Malformed, fingerprint

if TYPE_CHECKING:
    from .run import Run

_HASHES = "hashes.npy"


def collect_text(run: Run) -> None:
    """Make the text of every domain that does not stand yet."""
    work = _Domains(run)
    for name, domain in run.recipe.data.domains.items():
        place = run.path / "data" / name
        if not all(run.stands(place / part / MANIFEST) for part in domain.parts):
            work.make(name, domain)
        elif run.comm.first:
            work.note_changes(name, domain)


class _Domains:
    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe
        self.tokenizer = run.tokenizer
        self.place = run.path / "data"

    def make(self, name: str, domain: DomainSection) -> None:
        """Make the text of a domain; all ranks sample, the first does the rest."""
        comm, place = self.run.comm, self.place / name
        if not comm.first:
            for number, source in enumerate(domain.sources):
                if isinstance(source, SampledSource):
                    self._sample(name, number, source)
            comm.barrier()
            return
        with self.run.timed(f"data {name}") as facts:
            place.mkdir(parents=True, exist_ok=True)
            files = {path: fingerprint(path) for path in _paths(domain)}
            found = self._collect(name, domain)
            described = [source.model_dump() for source in domain.sources]
            if domain.held_out_tokens:
                where = f"evaluation text of {name}"
                text = from_sources(found.held_out, self.tokenizer, described, where)
                text.save(place / "evaluation")
            where, vocab = f"text of {name}", self.run.checkpoint.config.vocab_size
            data = from_sources(
                found.train,
                self.tokenizer,
                described,
                where,
                vocab,
                {"files": files, **found.facts},
                place,
            )
            self.run.packed(name, data, self.run.streams)  # refuses too little text now, not later
            data.save(place / "train")
            facts.update(documents=data.documents, tokens=data.tokens, **found.facts)
        comm.barrier()

    def note_changes(self, name: str, domain: DomainSection) -> None:
        """Say which files are no longer those that the text was made of; one may be gone."""
        files = read_json(self.place / name / "train" / MANIFEST).get("files", {})
        for path in _paths(domain):
            if (
                path in files
                and Path(path).expanduser().exists()
                and fingerprint(path) != files[path]
            ):
                self.run.reporter.note(
                    f"data.domains.{name}: {path} has changed; the run goes on with the text that "
                    "it has read; begin another one, without --from, for the new text"
                )

    def _collect(self, name: str, domain: DomainSection) -> Collection:
        """The documents of a domain, cleaned and divided; their tokens are on disk."""
        disk = self.place / name
        sampled: list[Document] = []
        read: list[Document] = []
        malformed = Malformed()  # of all sources together
        for number, source in enumerate(domain.sources):
            if isinstance(source, SampledSource):
                place = self._sample(name, number, source)
                answers = domain.loss == "answers"
                found = iter(read_documents(self.run.teacher, place, source.style, answers=answers))
                sampled += sources.spooled(found, disk)
        with self.run.reporter.counting(f"reading {name}") as show:
            counted = [0, 0]

            def seen(documents: int, size: int) -> None:
                counted[0] += documents
                counted[1] += size
                show(f"{counted[0]:,} documents, {counted[1] / 1e6:,.1f} MB")

            watch = Watch(self.run.interrupt.check, seen)
            for source in domain.sources:
                read += self._read(source, domain, disk, malformed, watch)
        collection = Collection(sampled, read, malformed, self.run.interrupt.check)
        if self.recipe.data.deduplicate:
            collection.deduplicate(self._earlier_hashes(name), disk / _HASHES)
        if self._contamination is not None:
            section = self.recipe.data.contamination
            assert section is not None
            collection.check(self._contamination, self.tokenizer, drop=section.action == "drop")
        collection.check_not_empty(f"domain {name}")
        if domain.passages:
            collection.evaluate_on(self._passages(domain))
        else:
            collection.hold_out(domain.held_out_tokens, f"domain {name}")
        return collection

    def _read(
        self,
        source: Source,
        domain: DomainSection,
        disk: Path,
        malformed: Malformed,
        watch: Watch,
    ) -> list[Document]:
        """The documents of a source that people wrote; none of one that the teacher writes."""
        if source.kind == "sampled":
            return []
        if source.kind == "stdlib":
            found = sources.read_stdlib(self.tokenizer, watch=watch)
            return sources.spooled(sources.up_to(found, source.max_tokens), disk)
        rules = replace(
            malformed,
            skip=source.malformed == "skip",
            max_bytes=source.max_document_bytes,
        )
        answers = domain.loss == "answers"
        found = sources.read_files(
            source.paths, self.tokenizer, rules, answers=answers, watch=watch
        )
        files = sources.spooled(found, disk)
        files.sort(key=lambda d: sources.hash_order(d.name))
        return list(sources.up_to(files, source.max_tokens))

    def _earlier_hashes(self, name: str) -> Iterator[int]:
        for other in self.recipe.data.domains:
            if other == name:
                return
            yield from read_hashes(self.place / other / _HASHES)

    @cached_property
    def _contamination(self) -> Contamination | None:
        section = self.recipe.data.contamination
        if section is None:
            return None
        asked = (q for task in section.tasks for q in questions(task))
        return Contamination(asked, section.words)

    def _sample(self, name: str, number: int, source: SampledSource) -> Path:
        """Let the teacher write the text of a source; where its files are."""
        place = self.place / name / f"sampled-{number}"
        stage = f"sample {name} {number}"
        metrics = sample_documents(
            self.run.teacher,
            source.style,
            documents=source.documents,
            max_new_tokens=source.max_new_tokens,
            directory=place,
            temperature=source.temperature,
            top_p=source.top_p,
            batch=source.batch,
            prompts_file=source.prompts,
            seed=derived_seed(self.recipe.seed, "sample", name, number),
            check=self.run.interrupt.check,
            comm=self.run.comm,
        )
        self.run.follow(metrics, stage, f"sampling {name} ({source.style})")
        return place

    def _passages(self, domain: DomainSection) -> list[Document]:
        """Human passages of request sets, taken in turns, as many as are wanted."""
        texts = [(task, passages(task)) for task in domain.passages]
        end = sources.document_end(self.tokenizer)
        found: list[Document] = []
        total = 0
        for turn in range(max(len(own) for _, own in texts)):
            for task, own in texts:
                if turn < len(own) and total < domain.held_out_tokens:
                    ids = [*self.tokenizer.encode(own[turn], special=False), *end]
                    found.append(Document(f"{task}:{turn}", ids))
                    total += len(ids)
        if total < domain.held_out_tokens:
            raise UserError(
                f"passages of {', '.join(domain.passages)} have {total} tokens, "
                f"held_out_tokens is {domain.held_out_tokens}"
            )
        return found


def _paths(domain: DomainSection) -> list[str]:
    """The files and directories that a domain is made of."""
    found: list[str] = []
    for source in domain.sources:
        if source.kind == "files":
            found += source.paths
        elif source.kind == "sampled" and source.prompts is not None:
            found.append(source.prompts)
    return found
