// Registers the CUDA kernels with PyTorch through its stable ABI; the schemas are defined in ddpm_fast/ops. Built where
// nvcc is, with any torch; loaded under a torch with CUDA alone, which has the symbols that this one leaves open.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("normal.cuda", TORCH_BOX(&ddpm_fast::cuda::normal));
  m.impl("noising.cuda", TORCH_BOX(&ddpm_fast::cuda::noising));
  m.impl("noising_random.cuda", TORCH_BOX(&ddpm_fast::cuda::noising_random));
  m.impl("denoise.cuda", TORCH_BOX(&ddpm_fast::cuda::denoise));
  m.impl("abs_quantile.cuda", TORCH_BOX(&ddpm_fast::cuda::abs_quantile));
  m.impl("norm_act.cuda", TORCH_BOX(&ddpm_fast::cuda::norm_act));
  m.impl("norm_act_backward.cuda", TORCH_BOX(&ddpm_fast::cuda::norm_act_backward));
  m.impl("rms_norm_act.cuda", TORCH_BOX(&ddpm_fast::cuda::rms_norm_act));
  m.impl("rms_norm_act_backward.cuda", TORCH_BOX(&ddpm_fast::cuda::rms_norm_act_backward));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
