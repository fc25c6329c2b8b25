"""Who has which slot and which pages: the host's side of `sambay_kernels.Slots`."""

from __future__ import annotations

import torch
from sambay_kernels import DecoderWeights, Slots

PAGE = 64
"""Tokens of a page."""


class States:
    """Slots and pages for sequences of up to `longest` tokens.

    Page 0 and the slot after the last are nobody's: steps of places in a batch that no sequence has go there. The slot
    behind that one keeps the states of a prompt for samples that have no slot yet.
    """

    BESIDE = 2
    """Slots beside the sequences': nobody's, and the prompt's."""

    def __init__(self, weights: DecoderWeights, *, slots: int, longest: int, pages: int) -> None:
        self.nobody, self.prompt = slots, slots + 1
        self.tensors = Slots(
            weights, slots=slots + self.BESIDE, pages=pages, page_size=PAGE, longest=longest, dtype=weights.embed.dtype
        )
        self._free_slots = list(range(slots))
        self._free_pages = list(range(1, pages))
        self._users = [0] * pages
        self._pages: list[list[int]] = [[] for _ in range(slots + self.BESIDE)]

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.tensors.lengths.device

    @property
    def pages(self) -> tuple[int, int]:
        """Pages that are in use, and all of them."""
        every = len(self._users) - 1
        return every - len(self._free_pages), every

    def take_slot(self) -> int | None:
        """A free slot, if there is one."""
        return self._free_slots.pop() if self._free_slots else None

    def room_for(self, slot: int, tokens: int) -> bool:
        """See to it that `slot` has pages of its own for so many tokens; False, and nothing done, where too few are."""
        have = self._pages[slot]
        wanted = -(-tokens // PAGE) - len(have)
        if wanted > len(self._free_pages):
            return False
        if wanted > 0:
            new = [self._new_page() for _ in range(wanted)]
            self.tensors.table[slot, len(have) : len(have) + wanted] = torch.tensor(new, dtype=torch.int32)
            have += new
        return True

    def start(self, slot: int, tokens: int) -> bool:
        """Begin `slot` without a token; False, and nothing done, where there are no pages for so many."""
        if not self.room_for(slot, tokens):
            return False
        self.tensors.clear_slot(slot)
        return True

    def copy(self, source: int, slot: int, tokens: int) -> bool:
        """Begin `slot` with the states of `source`: full pages are shared, the one still to be filled is copied.

        False, and nothing done, where there is no page for that.
        """
        pages, whole = self._pages[source], tokens // PAGE
        if tokens % PAGE and not self._free_pages:
            return False
        mine = pages[:whole]
        for page in mine:
            self._users[page] += 1
        if tokens % PAGE:
            mine = [*mine, self._new_page()]
            for pool in (self.tensors.page_keys, self.tensors.page_values):
                pool[:, mine[-1]] = pool[:, pages[whole]]
        self._pages[slot] = list(mine)
        self.tensors.table[slot, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        self.tensors.copy_slot(source, slot)
        return True

    def free(self, slot: int) -> None:
        """Take back a slot and the pages that nobody else uses."""
        for page in self._pages[slot]:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free_pages.append(page)
        self._pages[slot] = []
        # Its table must not lead a step of nobody's, or of a graph that runs on, into a page that is another's now.
        self.tensors.table[slot] = 0
        if slot < self.nobody:
            self._free_slots.append(slot)

    def _new_page(self) -> int:
        page = self._free_pages.pop()
        self._users[page] = 1
        return page


def slot_bytes(weights: DecoderWeights) -> int:
    """What a sequence's states and rings take of memory."""
    one = Slots(weights, slots=1, pages=0, page_size=PAGE, longest=PAGE, dtype=weights.embed.dtype)
    return sum(x.numel() * x.element_size() for x in (one.conv, one.scan, one.ring_keys, one.ring_values))


def page_bytes(weights: DecoderWeights) -> int:
    """What a page takes of memory."""
    return 2 * len(weights.full) * weights.key_heads * PAGE * weights.head_dim * weights.embed.element_size()


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses, and what torch holds of it and doesn't."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    return int(psutil.virtual_memory().available)
