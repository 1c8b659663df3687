"""The only tolerance numbers of the tests, each with its reason.

They are relative to the largest expected value of an array (at least 1 where `assert_close` says
nothing else), so that cancelling entries do not count by themselves. A tolerance is never raised
until a test passes: find out why the error is larger than the reason says. `pytest --errors` shows
how much of each was used.
"""

# ---- ops against the reference ------------------------------------------------------------------

# Sums of up to 10³ float64 products of numbers near 1 differ by their order: 1.1e-16 * 10³ if
# rounding errors lined up, and a gate or a softmax passes them on. Measured: up to 4e-14.
OP_F64 = 2e-13
# The same in float32 against float64 on the same rounded inputs. Errors add like a random walk:
# 6e-8 * √10³ = 2e-6. Measured: up to 1.5e-6.
OP_F32 = 5e-6
# Decays multiply: an error of b_t - b_s, |b| up to some 100, is one of exp(b_t - b_s), and the
# gates' gradients add over steps. Measured: up to 1.1e-5.
CELL_F32 = 2e-5

# ---- gradients ----------------------------------------------------------------------------------

# Central differences of fourth order with step 1e-4: rounding is 1e-16 * 1000 / 1e-4 = 1e-9 for
# functions of size up to 1000, truncation 1e-16 times a fifth derivative of up to some 10⁶.
GRADIENT_F64 = 1e-9
# Through two layers with random maps the fifth derivative is some 10⁴: the step is smaller, and
# rounding and truncation meet near 1e-8; 1e-6 is what the project promises.
DIRECTIONAL_F64 = 1e-6

# ---- cells --------------------------------------------------------------------------------------

# Recurrent, parallel and chunkwise form add the same terms in other orders; cumulated log decays of
# size 500 leave 500 * 1e-16 in an exponent.
FORMS_F64 = 1e-10
# The identities for the gate gradients subtract sums over all steps: 10³ terms, float64.
IDENTITY_F64 = 1e-11
# Public implementations add in another order, with decays as products of exp over chunks; float64
# leaves some 1e-13, 1e-9 is what the project promises.
PUBLIC_F64 = 1e-9
# Both sides in float32, relative to the largest value: 10² terms * 6e-8.
PUBLIC_F32 = 1e-5

# ---- the model ----------------------------------------------------------------------------------

# float32 logits by another route (attention branch of a hybrid mixer, gate forced to 0): the same
# products in another order; 1e-5 of the largest logit is what the project promises.
GATE_ZERO_IS_TEACHER = 1e-5
# Prefill and steps use the recurrent form and the cache where forward uses chunks: same bound.
PREFILL_STEP_F32 = 1e-5
# A document that moves in its row meets other chunk and block borders: summation order, float32.
DOCUMENT_MOVED = 1e-5

# ---- the real teacher ---------------------------------------------------------------------------

# Logits of SmolLM2-135M in float32 through 30 layers, ours against transformers': largest logits
# are near 40, 6e-8 * 40 is 2.4e-6, times some 10² roundings that add up; 2e-3 is what the project
# promises. Measured: 5.4e-4.
TEACHER_LOGITS = 2e-3
# Weights rounded to 8 bits of mantissa (2e-3 each, random signs): KL in nats a token between the
# model and itself. Measured: 5.4e-5 where the other operand is float32, 1.5e-4 where it is rounded
# too, and 1.2 to 1.4 % of the most probable tokens change, near ties.
BF16_KL = 2e-4
BF16_AGREE = 0.98

# Weights, and what they meet, in int8: rotated rows off by up to 1/254 of their largest, with
# random signs. On library sources 0.0059 and 0.961 were found for the student, 0.0049 and 0.958
# for the teacher.
INT8_REAL_KL = 1e-2
INT8_REAL_AGREE = 0.9
# The same of two layers with random weights.
INT8_KL = 1e-2

# ---- products of operands rounded to bf16 -------------------------------------------------------

# An operand is off by up to 2^-9 of itself, with random signs; two layers with random weights.
# Measured: 3.8e-5.
MIXED_KL = 1e-3
# Norm of the difference of a tensor's gradients over its norm: two roundings of 2^-9 a product,
# some ten products deep. Measured: up to 0.024.
MIXED_GRADIENT = 0.05
# The same of a sequence op's output: operands of one to four products in a row are off by up to
# 2^-9 with random signs, and a softmax turns a score's absolute error into a relative one.
# Measured: up to 0.0213 (dq behind a feature map), 0.01 elsewhere.
MIXED_OP = 0.03

# ---- sums of gradients in another order ---------------------------------------------------------

# Norm of a gradient: terms of float32 sums in another order, off by up to 6e-8 each.
# Measured: 6e-10, their signs are random.
ORDER_NORM = 1e-7
# What some steps of AdamW move, between sums in sequence and over the tree, norm over norm: where
# parts nearly cancel few digits are right, and the ratio m / sqrt(v) makes full steps of them.
# Measured: 5e-6.
ORDER_STEPS = 5e-5

# ---- stage I by layer ---------------------------------------------------------------------------

# A layer's relative error after training on hidden states that were rounded to bf16 before every
# layer, over the error after training on float32: inputs are off by up to 2^-9 of themselves, with
# random signs. Measured: 9.1e-4.
STREAM_BF16 = 3e-3
