"""Decides what the next step computes: which rows run, which wait, which are preempted. Knows no tensors and no model.

Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024): every decoding row gets
its token in every step, and prompt chunks fill the rest of the token budget, so running streams keep moving while
prompts come in. When the KV pool is full the row that would run last is preempted: its KV goes to the prefix cache and
it waits to be computed again. A row whose adapter isn't on the device yet is passed over and delays nobody.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ...storage.errors import ContextTooLong, DeadlineExceeded, Overloaded, TuneloopError
from .kv import KVPool
from .prefix_cache import PrefixCache
from .residency import AdapterResidency
from .row import Row


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    max_rows: int
    max_tokens_per_step: int
    max_waiting: int
    min_chunk: int = 32  # prompt tokens that a step takes at least, however slow the machine
    step_seconds: float = 0.25  # what prompt chunks may add to a step while rows decode
    max_passed: int = 64  # rows with adapters that may overtake one that waits for a device slot


@dataclass(frozen=True, slots=True)
class Work:
    """One row's share of a step: compute its next `count` tokens."""

    row: Row
    count: int


@dataclass
class Scheduler:
    pool: KVPool
    prefix: PrefixCache
    adapters: AdapterResidency
    limits: SchedulerLimits
    on_failure: Callable[[Row, TuneloopError], None]
    waiting: list[Row] = field(default_factory=list)
    running: list[Row] = field(default_factory=list)
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    seconds_per_prompt_token: float = 0.0  # measured, moving average

    def add(self, rows: list[Row]) -> None:
        """Queue a request's rows. Raises ContextTooLong or Overloaded, and then none of them is queued."""
        longest = rows[0].prompt_length + rows[0].params.max_tokens
        if longest > self.pool.max_tokens_per_row:
            raise ContextTooLong(
                f"The prompt has {rows[0].prompt_length} tokens and max_tokens is {rows[0].params.max_tokens}, "
                f"but this model's context holds {self.pool.max_tokens_per_row} tokens. "
                "Shorten the prompt or lower max_tokens.",
                param="messages",
            )
        if len(self.waiting) + len(rows) > self.limits.max_waiting:
            raise Overloaded(
                f"The queue is full: {len(self.waiting)} requests wait and the limit is {self.limits.max_waiting}. "
                "Try again later.",
                retry_after=max(1.0, 0.1 * len(self.waiting)),
            )
        self.waiting.extend(rows)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request's rows (or one of them), wherever they are. Unknown ones are safe: they have just finished."""
        for row in [*self.waiting, *self.running]:
            if row.request_id == request_id and index in (None, row.index):
                self.remove(row)

    def remove(self, row: Row) -> None:
        """Take a finished, failed or aborted row out; what it computed stays in the prefix cache."""
        if row in self.waiting:
            self.waiting.remove(row)
            return
        self.running.remove(row)
        self._give_up_slot(row)

    def fail(self, row: Row, error: TuneloopError) -> None:
        """End a row's request: without this row its others would compute for nobody."""
        self.abort(row.request_id)
        self.on_failure(row, error)

    def expire(self) -> None:
        """Fail the rows whose deadline has passed."""
        now = time.monotonic()
        late = {r.request_id: r for r in (*self.waiting, *self.running) if r.deadline is not None and r.deadline <= now}
        for row in late.values():
            self.fail(row, DeadlineExceeded("The request's time was up before it finished. Ask for fewer tokens."))

    def fail_adapter(self, digest: str, error: TuneloopError) -> None:
        """Fail the requests that wait for an adapter which cannot be loaded."""
        for row in {r.request_id: r for r in self.waiting if r.adapter == digest}.values():
            self.fail(row, error)

    def plan(self) -> list[Work]:
        """The next step's work; empty when nothing can run now."""
        self.running.sort(key=lambda r: r.order)
        decoding = [r for r in self.running if r.decoding]
        work = [Work(r, 1) for r in decoding if r.slot is not None and self._make_room(r, len(r.tokens))]
        work = [w for w in work if w.row.slot is not None]  # a later row may have preempted an earlier one
        budget = self._prompt_budget(decoding=len(work))
        budget = self._continue_prompts(work, budget)
        self._admit(work, budget)
        work = [w for w in work if w.row.slot is not None]
        owners = [r for r in self.running if r.slot is not None]
        self.pool.compact([r.slot for r in owners if r.slot is not None], [r.computed for r in owners])
        return work

    def computed(self, work: Iterable[Work], seconds: float) -> None:
        """Note that a step's tokens have their KV, and learn the speed."""
        prompt_tokens = 0
        for item in work:
            item.row.computed += item.count
            prompt_tokens += item.count if item.count > 1 else 0
        if prompt_tokens >= self.limits.min_chunk:
            measured = seconds / prompt_tokens
            old = self.seconds_per_prompt_token or measured
            self.seconds_per_prompt_token = 0.7 * old + 0.3 * measured

    def prove(self, row: Row) -> bool:
        """After finite logits of a row's last token: whether all of its KV is finite. Keeps a finished prompt's KV.

        Logits prove the KV of the token that they come from, as it attends to itself. Earlier tokens of a chunk may
        lie outside a sliding window, so they are looked at: what is masked still takes part in products.
        """
        assert row.slot is not None
        if row.computed - row.proven > 1 and not row.slot.lane.finite(row.slot.index, row.proven, row.computed):
            return False
        row.proven = row.computed
        if row.given == 0:
            self.prefix.store(row.root(), row.tokens, row.slot)
        return True

    def _prompt_budget(self, decoding: int) -> int:
        if decoding == 0 or self.seconds_per_prompt_token == 0.0:
            return self.limits.max_tokens_per_step
        affordable = int(self.limits.step_seconds / self.seconds_per_prompt_token)
        return max(self.limits.min_chunk, min(self.limits.max_tokens_per_step - decoding, affordable))

    def _continue_prompts(self, work: list[Work], budget: int) -> int:
        for row in self.running:
            if budget <= 0:
                break
            if not row.decoding and row.slot is not None:
                count = min(row.remaining, budget)
                work.append(Work(row, count))
                budget -= count
        return budget

    def _admit(self, work: list[Work], budget: int) -> None:
        passed: Row | None = None  # the first row that waits for a device slot
        present = {*self.waiting, *self.running}
        for row in sorted(self.waiting, key=lambda r: r.order):
            if budget <= 0 or len(self.running) >= self.limits.max_rows:
                break
            if row.leader is not None and row.leader in present and not self._forkable(row.leader):
                continue  # its prompt is being prefilled once, by the leader
            if row.adapter is not None and passed is not None and passed.passed >= self.limits.max_passed:
                continue  # the adapters in use would be used for ever
            if not self._claim_adapter(row):
                if passed is None and row.adapter is not None and self.adapters.waits_for_slot(row.adapter):
                    passed = row
                continue
            if not self._start(row):
                break  # the pool is full: later rows must not starve this one
            if passed is not None and row.adapter is not None:
                passed.passed += 1
            count = min(row.remaining, budget)
            work.append(Work(row, count))
            budget -= count

    @staticmethod
    def _forkable(leader: Row) -> bool:
        return leader.slot is not None and leader.computed >= leader.prompt_length

    def _claim_adapter(self, row: Row) -> bool:
        if row.adapter is None:
            return True
        assert row.adapter_path is not None
        row.adapter_slot = self.adapters.claim(row.adapter, row.adapter_path)
        return row.adapter_slot is not None

    def _release_adapter(self, row: Row) -> None:
        if row.adapter is not None:
            self.adapters.release(row.adapter)
            row.adapter_slot = None

    def _start(self, row: Row) -> bool:
        """Give a waiting row, whose adapter is claimed, its slot and what is known of its tokens."""
        slot = self.pool.allocate(len(row.tokens) + 1)
        if slot is None:
            self._release_adapter(row)
            return False
        row.slot = slot
        self._reuse(row)
        self.waiting.remove(row)
        self.running.append(row)
        row.started_at = row.started_at or time.monotonic()
        return True

    def _reuse(self, row: Row) -> None:
        """Fill the slot's beginning from the leader's slot or the prefix cache; one token is left to compute."""
        assert row.slot is not None
        row.computed = row.proven = 0
        if row.wants_prompt_logprobs:
            return
        leader = row.leader
        if leader is not None and leader.slot is not None and self._forkable(leader) and row.given == 0:
            row.computed = row.proven = row.prompt_length - 1
            row.slot.lane.copy(leader.slot, row.slot.index, row.computed)
            return
        limit = len(row.tokens) - 1
        row.computed = self.prefix.restore(self.prefix.match(row.root(), row.tokens, limit), row.slot)
        row.proven = row.computed
        if row.given == 0:
            row.cached = row.computed
            self.prefix_queries += row.prompt_length
            self.prefix_hits += row.computed

    def _make_room(self, row: Row, tokens: int) -> bool:
        """Let `row` hold `tokens` tokens, preempting rows that come after it. False if `row` itself had to go."""
        assert row.slot is not None
        while not self.pool.extend(row.slot, tokens, row.computed):
            last = max((r for r in self.running if r.slot is not None), key=lambda r: r.order)
            self._preempt(last)
            if last is row:
                return False
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self.running.remove(row)
        self._give_up_slot(row)
        row.computed = row.proven = 0
        self.waiting.append(row)

    def _give_up_slot(self, row: Row) -> None:
        """Keep a leaving row's KV. What no logits have proven is looked at, so that no NaN reaches another row."""
        assert row.slot is not None
        lane, index = row.slot.lane, row.slot.index
        if row.computed == row.proven or lane.finite(index, row.proven, row.computed):
            self.prefix.store(row.root(), row.tokens[: row.computed], row.slot)
        else:
            lane.clear(index)
        self.pool.release(row.slot)
        row.slot = None
        self._release_adapter(row)

    def check_integrity(self) -> None:
        """Assert the invariants that tests and idle time rely on."""
        assert all(r.slot is None for r in self.waiting) and all(r.slot is not None for r in self.running)
        owned = [(r.slot.lane.capacity, r.slot.index) for r in self.running if r.slot is not None]
        assert len(owned) == len(set(owned))
        used = sum(lane.used for lane in self.pool.lanes.values())
        assert used == len(self.running), (used, len(self.running))
        self.pool.check_integrity()
        self.prefix.check_integrity()
        self.adapters.check_integrity()
