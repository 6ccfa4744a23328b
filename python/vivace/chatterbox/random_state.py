"""torch's default generators: what Chatterbox's loop draws from."""

import torch


def default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def draw_seed() -> int:
    """A seed from torch's CPU generator: torch.manual_seed makes it, and so what follows, repeatable."""
    return int(torch.randint(1 << 62, ()))


def capture(device: torch.device) -> tuple[int, bytes]:
    """The default generator's seed and state."""
    generator = default_generator(device)
    return generator.initial_seed() & ((1 << 63) - 1), bytes(generator.get_state().tolist())


def advance(device: torch.device, vocab_size: int, draws: int) -> None:
    """Moves the default generator on as `draws` calls of torch.multinomial over the vocabulary do."""
    if draws <= 0:
        return
    probs = torch.ones(1, vocab_size, device=device)
    if device.type != "cuda":
        for _ in range(draws):
            torch.multinomial(probs, 1)
        return
    generator = default_generator(device)
    before = generator.get_offset()
    torch.multinomial(probs, 1)
    generator.set_offset(before + draws * (generator.get_offset() - before))
