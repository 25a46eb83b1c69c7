"""What tensors of examples/pytorch share, and what a user can get wrong:

    python3 pytorch_test.py examples/pytorch libmoe_torch.so
"""

import gc
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor

import torch

folder, library = sys.argv[1:]
sys.path.insert(0, folder)
torch.classes.load_library(library)

from moe_torch import MoE  # noqa: E402


class TensorsTest(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)
        self.layer = MoE(width=6, hidden=5, experts=4, top_k=2)
        self.x = torch.randn(9, 6)
        self.dy = torch.randn(9, 6)
        self.weight = self.layer.experts.get_submodule("0").up.weight

    def gradients(self):
        """Of one pass, copied."""
        inputs = list(self.layer.parameters())
        return [g.clone() for g in torch.autograd.grad(self.layer(self.x, 1), inputs, self.dy)]

    def evaluate(self):
        with torch.no_grad():
            return self.layer(self.x)

    def test_parameters_are_named_as_in_a_state_dict_and_share_the_layers_memory(self):
        names = ["gate.weight"] + [
            f"experts.{e}.{part}" for e in range(4)
            for part in ("up.weight", "up.bias", "down.weight", "down.bias")
        ]
        self.assertEqual(list(self.layer.state_dict()), names)
        before = self.layer.eval()(self.x)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.shape[0] == 1:
                    parameter.add_(1)
        self.assertFalse(torch.equal(before, self.layer(self.x)))
        for tensor, parameter in zip(self.layer.layer.parameters().values(), self.layer.parameters()):
            self.assertEqual(tensor.data_ptr(), parameter.data_ptr())

    def test_gradients_stay_in_one_place_where_they_are_dropped_between_updates(self):
        places = set()
        for step in range(3):
            self.layer.zero_grad(set_to_none=True)
            self.layer(self.x, step).backward(self.dy)
            places.add(self.layer.gate.weight.grad.data_ptr())
        self.assertEqual(len(places), 1)

    def test_a_gradient_that_is_held_is_not_overwritten(self):
        held = torch.autograd.grad(self.layer(self.x, 1), self.weight, self.dy)[0]
        copy = held.clone()
        torch.autograd.grad(self.layer(self.x, 1), self.weight, 2 * self.dy)
        self.assertTrue(torch.equal(held, copy))

    def test_a_held_gradient_of_a_frozen_parameter_is_not_overwritten_or_freed(self):
        for is_unfrozen in (False, True):
            with self.subTest(is_unfrozen=is_unfrozen):
                # Wide enough that memory of this size is taken again soon after it became free.
                layer = MoE(width=64, hidden=64, experts=2, top_k=2)
                x, dy = torch.randn(9, 64), torch.randn(9, 64)
                weight = layer.experts.get_submodule("0").up.weight
                layer(x, 1).backward(dy)
                held, copy = weight.grad, weight.grad.clone()
                weight.requires_grad_(False)
                layer(x, 2).backward(dy)
                self.assertTrue(torch.equal(held, copy))
                weight.requires_grad_(is_unfrozen)
                trained = [p for p in layer.parameters() if p.requires_grad]
                torch.autograd.grad(layer(x, 3), trained, 2 * dy)
                others = [torch.randn(held.shape) for _ in range(99)]
                self.assertTrue(torch.equal(held, copy))
                del others

    def test_what_a_program_writes_into_a_gradient_does_not_reach_the_next(self):
        expected = self.gradients()
        layer = self.layer
        layer.zero_grad(set_to_none=True)
        layer(self.x[:1], 1).backward(self.dy[:1])  # two of the four experts get no token
        for parameter in layer.parameters():
            parameter.grad.add_(1)
        layer.zero_grad(set_to_none=True)
        for a, b in zip(self.gradients(), expected):
            self.assertTrue(torch.equal(a, b))

    def test_each_tensor_keeps_its_memory_alone(self):
        for make in (
            lambda: torch.autograd.grad(self.layer(self.x, 1), self.weight, self.dy)[0],
            lambda: self.layer(self.x, 1),
            lambda: self.layer.eval()(self.x),
            lambda: self.layer.layer.parameters()["gate.weight"],
        ):
            self.setUp()
            made = make()
            tensor, copy = made.detach(), made.detach().clone()
            del made, self.layer, self.weight
            gc.collect()
            others = [torch.randn(tensor.shape) for _ in range(99)]  # in what memory became free
            self.assertTrue(torch.equal(tensor, copy))
            del others

    def test_backward_adds_to_gradients(self):
        expected = self.gradients()
        for set_to_none in (True, False):
            self.layer.zero_grad(set_to_none=set_to_none)
            for _ in range(3):
                self.layer(self.x, 1).backward(self.dy)
            for parameter, gradient in zip(self.layer.parameters(), expected):
                torch.testing.assert_close(parameter.grad, 3 * gradient)

    def test_y_and_dx_are_not_overwritten_by_the_next_pass(self):
        self.x.requires_grad_()
        y = self.layer(self.x, 1)
        dx = torch.autograd.grad(y, self.x, self.dy, retain_graph=True)[0]
        copies = y.detach().clone(), dx.clone()
        self.layer(2 * self.x, 2)
        again = torch.autograd.grad(y, self.x, 2 * self.dy)[0]
        self.assertTrue(torch.equal(y, copies[0]))
        self.assertTrue(torch.equal(dx, copies[1]))
        torch.testing.assert_close(again, 2 * dx)

    def test_several_passes_may_be_in_flight(self):
        expected = self.gradients()
        first, second = self.layer(self.x, 1), self.layer(2 * self.x, 2)
        del second
        got = torch.autograd.grad(first, list(self.layer.parameters()), self.dy)
        for a, b in zip(got, expected):
            self.assertTrue(torch.equal(a, b))

    def test_passes_in_several_threads(self):
        expected = self.gradients()
        with ThreadPoolExecutor(4) as pool:
            for gradients in pool.map(lambda _: self.gradients(), range(64)):
                for a, b in zip(gradients, expected):
                    self.assertTrue(torch.equal(a, b))

    def test_tensors_that_are_not_contiguous(self):
        y = self.evaluate()
        expected = self.gradients()
        self.x = torch.stack([self.x, self.x], 2)[:, :, 1]
        self.dy = self.dy.t().contiguous().t()
        self.assertTrue(torch.equal(self.evaluate(), y))
        for a, b in zip(self.gradients(), expected):
            self.assertTrue(torch.equal(a, b))
        # Rows that are all the same memory, as those of y.sum(0).backward(row) are.
        self.dy = torch.ones(1, 6).expand(9, 6)
        got = self.gradients()
        self.dy = torch.ones(9, 6)
        for a, b in zip(got, self.gradients()):
            self.assertTrue(torch.equal(a, b))

    def test_a_frozen_parameter_gets_no_gradient_and_the_others_the_same(self):
        expected = self.gradients()
        self.weight.requires_grad_(False)
        self.layer(self.x, 1).backward(self.dy)
        for parameter, gradient in zip(self.layer.parameters(), expected):
            if parameter is self.weight:
                self.assertIsNone(parameter.grad)
            else:
                self.assertTrue(torch.equal(parameter.grad, gradient))
        self.weight.requires_grad_()
        for a, b in zip(self.gradients(), expected):
            self.assertTrue(torch.equal(a, b))

    def test_the_noise_is_the_steps(self):
        layer = MoE(width=6, hidden=5, experts=4, top_k=2, gate="NoisyTopK")
        self.assertTrue(torch.equal(layer(self.x, 1), layer(self.x, 1)))
        self.assertFalse(torch.equal(layer(self.x, 1), layer(self.x, 2)))
        y = layer.eval()(self.x)
        self.assertTrue(torch.equal(layer(self.x, 1), y))
        self.assertFalse(torch.equal(layer.train()(self.x, 1), y))

    def test_a_training_pass_needs_a_step(self):
        self.x.requires_grad_()
        with self.assertRaisesRegex(ValueError, "step = None, must be a number in a training pass"):
            self.layer(self.x)
        y = self.layer(self.x, 0)
        self.assertTrue(y.requires_grad)
        for without_graph in (torch.no_grad(), torch.inference_mode()):
            with without_graph:
                self.assertTrue(torch.equal(self.layer(self.x), y))
        for step in (None, 1):
            evaluated = self.layer.eval()(self.x, step)
            self.assertTrue(torch.equal(evaluated, y))
            self.assertFalse(evaluated.requires_grad)

    def test_the_balance_losses_are_part_of_the_backward_pass(self):
        layer = MoE(width=6, hidden=5, experts=4, top_k=2, balance=0.5)
        layer(self.x, 1).backward(torch.zeros(9, 6))
        self.assertGreater(layer.gate.weight.grad.abs().max().item(), 0)
        self.assertEqual(layer.experts.get_submodule("0").up.weight.grad.abs().max().item(), 0)

    def test_no_tokens(self):
        x = torch.zeros(0, 6, requires_grad=True)
        y = self.layer(x, 1)
        y.sum().backward()
        self.assertEqual(y.shape, (0, 6))
        self.assertEqual(self.layer.eval()(x).shape, (0, 6))
        self.assertEqual(self.weight.grad.abs().max().item(), 0)

    def test_a_state_dict_is_copied_into_the_layer(self):
        other = MoE(width=6, hidden=5, experts=4, top_k=2, seed=2)
        other.load_state_dict(self.layer.state_dict())
        self.assertTrue(torch.equal(other.eval()(self.x), self.layer.eval()(self.x)))

    def test_what_is_wrong_is_named(self):
        def refuses(message, call):
            with self.assertRaisesRegex((RuntimeError, ValueError), message):
                call()

        refuses("x has 5 columns, Config.width = 6", lambda: self.layer(torch.zeros(9, 5), 1))
        refuses("expected scalar type Float but found Double",
                lambda: self.layer(self.x.double(), 1))
        refuses("a tensor of shape \\[9\\].*must be T x D",
                lambda: self.layer.layer.evaluate(torch.zeros(9), list(self.layer.parameters())))
        refuses("meta.*must be T x D.*on the CPU",
                lambda: self.layer(torch.zeros(9, 6, device="meta"), 1))
        refuses("top_k = 5", lambda: MoE(width=6, hidden=5, experts=4, top_k=5))
        refuses("1 parameters, must be 17",
                lambda: self.layer.layer.forward(self.x, [self.weight], 1))
        refuses("1 parameters, must be 17",
                lambda: self.layer.layer.evaluate(self.x, [self.weight]))
        refuses("no second derivatives",
                lambda: torch.autograd.grad(self.layer(self.x, 1), self.weight, self.dy, create_graph=True))
        y = self.layer(self.x, 1)
        with torch.no_grad():
            self.weight.mul_(2)
        refuses("modified by an inplace operation", lambda: y.backward(self.dy))
        y = self.layer(self.x, 1)
        y.backward(self.dy)
        refuses("second time", lambda: y.backward(self.dy))

    def test_parameters_that_are_not_the_layers_any_more_are_refused(self):
        data = self.weight.data
        for other, message in (
            (data.clone(), r"\[6, 5\], strides \[5, 1\]"),
            (data.double(), r"\[6, 5\], strides \[5, 1\]"),
            (data.t(), r"\[5, 6\], strides \[1, 5\]"),
            (data[:5], r"\[5, 5\], strides \[5, 1\]"),
            (torch.as_strided(data, (6, 5), (1, 6)), r"\[6, 5\], strides \[1, 6\]"),
        ):
            message = f"experts.0.up.weight has shape {message}, must be \\[6, 5\\] in the layer's memory"
            self.weight.data = other
            for layer in (self.layer.train(), self.layer.eval()):
                with self.assertRaisesRegex(RuntimeError, message):
                    layer(self.x, 1)
            self.weight.data = data
            self.layer(self.x, 1)


unittest.main(argv=sys.argv[:1])
