// Registers the CPU kernels with PyTorch through its stable ABI; the schemas are defined in ddpm_fast/ops.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("normal.cpu", TORCH_BOX(&ddpm_fast::normal));
  m.impl("noising.cpu", TORCH_BOX(&ddpm_fast::noising));
  m.impl("noising_random.cpu", TORCH_BOX(&ddpm_fast::noising_random));
  m.impl("noising_drawn.cpu", TORCH_BOX(&ddpm_fast::noising_drawn));
  m.impl("target_loss.cpu", TORCH_BOX(&ddpm_fast::target_loss));
  m.impl("target_loss_backward.cpu", TORCH_BOX(&ddpm_fast::target_loss_backward));
  m.impl("bound_terms.cpu", TORCH_BOX(&ddpm_fast::bound_terms));
  m.impl("bound_terms_backward.cpu", TORCH_BOX(&ddpm_fast::bound_terms_backward));
  m.impl("denoise.cpu", TORCH_BOX(&ddpm_fast::denoise));
  m.impl("abs_quantile.cpu", TORCH_BOX(&ddpm_fast::abs_quantile));
  m.impl("norm_act.cpu", TORCH_BOX(&ddpm_fast::norm_act));
  m.impl("norm_act_backward.cpu", TORCH_BOX(&ddpm_fast::norm_act_backward));
  m.impl("rms_norm_act.cpu", TORCH_BOX(&ddpm_fast::rms_norm_act));
  m.impl("rms_norm_act_backward.cpu", TORCH_BOX(&ddpm_fast::rms_norm_act_backward));
  m.impl("conv3x3.cpu", TORCH_BOX(&ddpm_fast::conv3x3));
  m.impl("linear_attention.cpu", TORCH_BOX(&ddpm_fast::linear_attention));
  m.impl("projected_linear_attention.cpu", TORCH_BOX(&ddpm_fast::projected_linear_attention));
}

static PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(ddpm_fast::isa_name()); }

static PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set that the CPU kernels use: avx512, avx2 or generic."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
