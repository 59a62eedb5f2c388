"""The code cells of the notebook that this project started from, with the name of the package replaced."""

CELLS = [
    """\
import torch
from functorch_lite import grad
x = torch.randn([])
cos_x = grad(lambda x: torch.sin(x))(x)
assert torch.allclose(cos_x, x.cos())

# Second-order gradients
neg_sin_x = grad(grad(lambda x: torch.sin(x)))(x)
assert torch.allclose(neg_sin_x, -x.sin())
""",
    """\
import torch
from functorch_lite import vmap
batch_size, feature_size = 3, 5
weights = torch.randn(feature_size, requires_grad=True)

def model(feature_vec):
 # Very simple linear model with activation
 assert feature_vec.dim() == 1
 return feature_vec.dot(weights).relu()

examples = torch.randn(batch_size, feature_size)
result = vmap(model)(examples)
""",
    """\
from functorch_lite import vmap
batch_size, feature_size = 3, 5

def model(weights,feature_vec):
 # Very simple linear model with activation
 assert feature_vec.dim() == 1
 return feature_vec.dot(weights).relu()

def compute_loss(weights, example, target):
 y = model(weights, example)
 return ((y - target) ** 2).mean() # MSELoss

weights = torch.randn(feature_size, requires_grad=True)
examples = torch.randn(batch_size, feature_size)
targets = torch.randn(batch_size)
inputs = (weights,examples, targets)
grad_weight_per_example = vmap(grad(compute_loss), in_dims=(None, 0, 0))(*inputs)
""",
    """\
from functorch_lite import vjp

inputs = torch.randn(3)
func = torch.sin
cotangents = (torch.randn(3),)

outputs, vjp_fn = vjp(func, inputs); vjps = vjp_fn(*cotangents)
""",
    """\
from functorch_lite import jvp
x = torch.randn(5)
y = torch.randn(5)
f = lambda x, y: (x * y)
_, output = jvp(f, (x, y), (torch.ones(5), torch.ones(5)))
assert torch.allclose(output, x + y)
""",
    """\
from functorch_lite import jacrev
x = torch.randn(5)
jacobian = jacrev(torch.sin)(x)
expected = torch.diag(torch.cos(x))
assert torch.allclose(jacobian, expected)
""",
    """\
x = torch.randn(64, 5)
jacobian = vmap(jacrev(torch.sin))(x)
assert jacobian.shape == (64, 5, 5)
""",
    """\
from functorch_lite import jacfwd
x = torch.randn(5)
jacobian = jacfwd(torch.sin)(x)
expected = torch.diag(torch.cos(x))
assert torch.allclose(jacobian, expected)
""",
    """\
def f(x):
 return x.sin().sum()

x = torch.randn(5)
hessian0 = jacrev(jacrev(f))(x)
hessian1 = jacfwd(jacrev(f))(x)
""",
    """\
from functorch_lite import hessian

def f(x):
 return x.sin().sum()

x = torch.randn(5)
hess = hessian(f)(x)
""",
]
