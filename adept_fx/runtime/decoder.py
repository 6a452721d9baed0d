"""The forward of an exit-aware decoder."""

import inspect
import threading
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adept_fx.capture import accepts, capture
from adept_fx.errors import InputError, StaleGraphError
from adept_fx.kv.base import build_policy
from adept_fx.pipeline import Program, build, start
from adept_fx.runtime.call import Call, read_call
from adept_fx.runtime.compiled import Stacks, compile_program
from adept_fx.runtime.fingerprint import Fingerprint, agree, choices, refuse_hooks
from adept_fx.runtime.masks import build_mask, past_length, real_tokens
from adept_fx.runtime.run import Run
from adept_fx.shell import plain_shell

if TYPE_CHECKING:
    from adept_fx.runtime.handle import Adept


class ExitAwareForward:
    """Takes the place of a decoder's ``forward``.

    Keeps the programs captured so far (one per form of call), nothing of any call.

    Args:
        adept: The model's handle.
        decoder: The decoder shell whose ``forward`` this is.
    """

    def __init__(self, adept: "Adept", decoder: nn.Module) -> None:
        self.adept = adept
        self.decoder = decoder
        self._lock = threading.RLock()
        self._programs: dict[bool, tuple[Program, Fingerprint]] = {}
        self._options: dict[str, Any] | None = None
        self._stacks = Stacks()
        self._layers = getattr(decoder.config, "num_hidden_layers", None)
        self._choices = choices(decoder)
        self._takes_positions = accepts(decoder, "position_ids")
        # What tools that look at a forward's parameters are to see.
        forward = inspect.signature(type(decoder).forward)
        self.__signature__ = forward.replace(parameters=list(forward.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with exits; same arguments and output as the original's forward."""
        call = read_call(self.decoder, self.__signature__, args, kwargs)
        program = self.program(positions=self._takes_positions and call.position_ids is not None)
        shape = (call.embeds.shape[0], call.embeds.shape[1])
        real = real_tokens(call.attention_mask, shape, call.cache)
        settings = self.adept.settings(program, shape[1])
        inputs = self._inputs(program, call)
        masks = [
            item for name, item in zip(program.inputs, inputs, strict=True) if name in program.masks
        ]
        packable = all(m is None or (isinstance(m, Tensor) and m.ndim == 4) for m in masks)
        run = Run(settings, shape, real, call.cache, call.embeds.device, packable)
        hidden = program.graph(run, *inputs)
        self.adept.record(run)
        output = program.output_type(last_hidden_state=hidden, past_key_values=call.cache)
        return output if call.return_dict else output.to_tuple()

    def program(self, *, positions: bool) -> Program:
        """The program for calls with or without ``position_ids``; captured again after changes.

        Raises:
            AdeptError: The decoder cannot be captured or rewritten.
        """
        self._check_layers()
        found = self._programs.get(positions)
        if found is not None and found[1].matches():
            return found[0]
        if found is not None and self._options is not None:
            raise StaleGraphError(
                "the model changed (a module, a tensor's dtype or device, its mode, a hook or a "
                "setting) after adept.compile()",
                hint="undo the change, or adept.uncompile() and compile() again",
            )
        with self._lock:
            found = self._programs.get(positions)
            if found is None or not found[1].matches():
                found = self._capture(positions)
                if self._options is not None:
                    compile_program(found[0], self._stacks, self._options)
                self._programs[positions] = found
            return found[0]

    def _check_layers(self) -> None:
        """Raises if something cut the config's layers down, as ``assistant_early_exit`` does."""
        config: Any = self.decoder.config
        if config.num_hidden_layers != self._layers:
            asked, config.num_hidden_layers = config.num_hidden_layers, self._layers
            raise InputError(
                f"the call asks for {asked} of {self._layers} layers (assistant_early_exit?)",
                hint="assistant_early_exit cannot be combined with exits: use the original model",
            )

    def _capture(self, positions: bool) -> tuple[Program, Fingerprint]:
        refuse_hooks(self.decoder)
        self._choices = agree(self.decoder, self._choices)
        seen = Fingerprint.of(self.decoder, skip=self.adept)
        captured = capture(plain_shell(self.decoder), positions=positions)
        config = self.adept.config
        needs = tuple(gate.needs for gate in self.adept.gate_list())
        work = start(captured, config.exit_layers, needs, build_policy(config.kv))
        return build(captured, work), seen

    def prepare(self) -> Program:
        """Captures the form that ``generate`` calls."""
        return self.program(positions=self._takes_positions)

    def current(self) -> Program:
        """The program captured last, or the form that ``generate`` calls."""
        found = list(self._programs.values())
        return found[0][0] if found else self.prepare()

    def forget(self) -> None:
        """Makes the next call capture again."""
        with self._lock:
            self._programs.clear()

    def compile(self, options: dict[str, Any]) -> None:
        """Compiles what is captured, and what will be."""
        with self._lock:
            self.uncompile()
            self._options = options
            self.prepare()

    def uncompile(self) -> None:
        """Back to eager; every parameter gets its own memory again."""
        with self._lock:
            self._stacks.undo()
            self._options = None
            self.forget()

    def _inputs(self, program: Program, call: Call) -> list[Any]:
        supplied: dict[str, Any] = {
            "inputs_embeds": call.embeds,
            "position_ids": call.position_ids,
        }
        for name, mask in program.masks.items():
            supplied[name] = build_mask(
                mask, call.attention_mask, call.embeds, call.cache, call.position_ids
            )
        if "attention_mask" in program.inputs:
            supplied["attention_mask"] = self._mask_2d(call)
        if "past" in program.inputs:
            # Only its length is read.
            supplied["past"] = torch.empty(past_length(call.cache), device="meta")
        return [supplied[name] for name in program.inputs]

    def _mask_2d(self, call: Call) -> Tensor:
        mask = call.attention_mask
        if mask is None:
            length = past_length(call.cache) + call.embeds.shape[1]
            return torch.ones(
                call.embeds.shape[0], length, dtype=torch.long, device=call.embeds.device
            )
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise InputError(
                "this decoder computes with the 2-D attention_mask; it was given another kind",
                hint="pass a 2-D mask, e.g. generate without a static cache",
            )
        return mask.to(device=call.embeds.device, dtype=torch.long)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExitAwareForward":
        """A copy captures its own graphs, and is not compiled: those look into other modules."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.adept = deepcopy(self.adept, memo)
        copied.decoder = deepcopy(self.decoder, memo)
        copied._lock = threading.RLock()
        copied._programs = {}
        copied._options = None
        copied._stacks = Stacks()
        copied.__signature__ = self.__signature__
        copied._layers = self._layers
        copied._choices = dict(self._choices)
        copied._takes_positions = self._takes_positions
        return copied
