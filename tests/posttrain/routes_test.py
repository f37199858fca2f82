"""Routes find the places of their keys; wrong ones are refused."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from dsv3_jax.posttrain import routes

N_EXPERTS, N_MOE, N_ROUTERS, TOP_K = 8, 3, 4, 2
LENGTHS = 5, 3, 4
# Two rows of nine places: samples 2 and 0, then 1.
SAMPLES = np.array([[2] * 4 + [0] * 5, [1] * 3 + [-1] * 6])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 0, 0, 0, 0, 0, 0]])


def drawn():
  """Returns routes of all samples in order of their keys."""
  rng = np.random.default_rng(0)
  n = sum(LENGTHS)
  experts = rng.random((n, N_ROUTERS, N_EXPERTS)).argsort(-1)[..., :TOP_K]
  return routes.Routes(
    samples=np.repeat(np.arange(3), LENGTHS),
    positions=np.concatenate([np.arange(m) for m in LENGTHS]),
    tokens=rng.permutation(100)[:n],
    experts=experts,
  )


def taken(of, index):
  """Returns the routes at these indices of the list."""
  columns = (getattr(of, f.name)[index] for f in dataclasses.fields(of))
  return routes.Routes(*columns)


class PackTest(parameterized.TestCase):
  def test_puts_each_at_the_place_of_its_key_in_any_order(self):
    of = drawn()
    shuffled = taken(of, np.random.default_rng(1).permutation(12))
    for given in of, shuffled:
      experts, tokens = routes.pack(given, SAMPLES, POSITIONS)
      self.assertEqual(experts.dtype, np.int32)
      for place in np.ndindex(SAMPLES.shape):
        key = SAMPLES[place], POSITIONS[place]
        index = [
          i for i in range(12) if (of.samples[i], of.positions[i]) == key
        ]
        want = of.experts[index[0]] if index else -1
        np.testing.assert_array_equal(experts[place], want)
        self.assertEqual(tokens[place], of.tokens[index[0]] if index else -1)

  def test_a_token_without_route_has_none(self):
    experts, tokens = routes.pack(
      taken(drawn(), np.arange(11)), SAMPLES, POSITIONS
    )
    np.testing.assert_array_equal(experts[0, 3], -1)
    self.assertEqual(tokens[0, 3], -1)
    none = taken(drawn(), np.arange(0))
    np.testing.assert_array_equal(routes.pack(none, SAMPLES, POSITIONS)[0], -1)

  def test_refuses_what_has_no_one_place(self):
    of = drawn()
    double = taken(of, np.append(np.arange(12), 3))
    with self.assertRaisesRegex(ValueError, "two have the same sample"):
      routes.pack(double, SAMPLES, POSITIONS)
    with self.assertRaisesRegex(ValueError, "3 of 12 have no place"):
      routes.pack(of, SAMPLES[:1], POSITIONS[:1])
    with self.assertRaisesRegex(ValueError, "two places have the same"):
      routes.pack(of, SAMPLES[[0, 1, 1]], POSITIONS[[0, 1, 1]])
    short = dataclasses.replace(of, experts=of.experts[1:])
    with self.assertRaisesRegex(ValueError, "differ in N"):
      routes.pack(short, SAMPLES, POSITIONS)


class ValidateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.required = SAMPLES >= 0
    self.experts, self.keys = routes.pack(drawn(), SAMPLES, POSITIONS)
    self.tokens = np.where(self.required, self.keys, 7)

  def validate(self, experts, keys=None):
    keys = self.keys if keys is None else keys
    routes.validate(experts, keys, self.tokens, self.required, N_EXPERTS, N_MOE)

  def test_takes_what_is_right(self):
    self.validate(self.experts)
    # A sampler need not have run the MTP modules.
    self.experts[..., N_MOE:, :] = -1
    self.validate(self.experts)

  @parameterized.parameters(
    ((0, 2, 1), -1, "no route at 1 of 18 tokens, the first at .0, 2."),
    ((0, 2, 1, 0), -1, "no expert of 0 to 7"),  # in one slot only
    ((0, 2, 1, 1), -1, "no expert of 0 to 7"),
    ((0, 2, 3, 1), N_EXPERTS, "no expert of 0 to 7"),  # an MTP module's
    ((1, 0, 0, 0), -2, "no expert of 0 to 7"),
    ((1, 2, 3), 5, "an expert twice"),
    ((1, 2, 0), 5, "an expert twice"),
  )
  def test_refuses_an_expert(self, at, value, message):
    self.experts[at] = value
    with self.assertRaisesRegex(ValueError, message):
      self.validate(self.experts)

  def test_refuses_routes_of_other_tokens(self):
    message = "the route of another token at 9 of 18 tokens"
    with self.assertRaisesRegex(ValueError, message):
      shifted = (np.roll(a[:1], 1, 1) for a in (self.experts, self.keys))
      pairs = zip(shifted, (self.experts, self.keys), strict=True)
      self.validate(*(np.concatenate([a, b[1:]]) for a, b in pairs))
    of = drawn()  # samples 0 and 2 change places, as far as both go
    swapped = dataclasses.replace(of, samples=2 - of.samples)
    kept = swapped.positions < np.array(LENGTHS)[swapped.samples]
    packed = routes.pack(taken(swapped, kept), SAMPLES, POSITIONS)
    self.required[0, 8] = False
    with self.assertRaisesRegex(ValueError, "the route of another token at 8"):
      self.validate(*packed)

  def test_refuses_other_lengths(self):
    with self.assertRaisesRegex(ValueError, "must be of the same tokens"):
      self.validate(self.experts[:, 1:])


if __name__ == "__main__":
  absltest.main()
