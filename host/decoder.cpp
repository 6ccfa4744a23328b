#include "host/decoder.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/api/module.h>

#include <sstream>

namespace vivace {
namespace {

using at::Tensor;
using torch::jit::Module;

/// What is not as expected; caught in Decoder::stack.
struct Mismatch {
  std::string text;
};

template <typename... Parts>
void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw Mismatch{text.str()};
}

Module submodule(const Module& module, const std::string& name) {
  expect(module.hasattr(name), "it has no ", name);
  const auto value = module.attr(name);
  expect(value.isModule(), name, " is no module");
  return value.toModule();
}

/// A tensor by its path of attributes: "qkv.weight".
Tensor tensor_at(const Module& module, const std::string& path) {
  const size_t dot = path.find('.');
  if (dot != std::string::npos) return tensor_at(submodule(module, path.substr(0, dot)), path.substr(dot + 1));
  expect(module.hasattr(path), "it has no ", path);
  const auto value = module.attr(path);
  expect(value.isTensor(), path, " is no tensor");
  return value.toTensor();
}

void expect_shape(const Tensor& t, const std::string& name, at::IntArrayRef shape) {
  expect(t.sizes() == shape, name, " has shape ", t.sizes(), ", expected ", shape);
}

/// A single parameter, on the device in dtype; the module keeps it.
Tensor moved(const Module& module, const std::string& path, at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor parameter = tensor_at(module, path);
  expect_shape(parameter, path, shape);
  parameter.set_data(parameter.to(c10::typeMetaToScalarType(options.dtype())).to(options.device()).contiguous());
  return parameter;
}

/// The same parameter of every layer: (layers, shape...).
Tensor stacked(const std::vector<Module>& layers, const std::string& path, at::IntArrayRef shape,
               const at::TensorOptions& options) {
  std::vector<int64_t> size(shape.begin(), shape.end());
  size.insert(size.begin(), static_cast<int64_t>(layers.size()));
  const Tensor all = at::empty(size, options);
  for (size_t i = 0; i < layers.size(); ++i) {
    Tensor parameter = tensor_at(layers[i], path);
    const Tensor slice = all.select(0, static_cast<int64_t>(i));
    slice.copy_(parameter.to(c10::typeMetaToScalarType(options.dtype())));
    parameter.set_data(slice);
  }
  return all;
}

template <typename Signature>
auto typed_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

std::unique_ptr<Decoder> Decoder::stack(Module& module, const Manifest& manifest, at::Device device, at::ScalarType dtype,
                                        std::string& why) {
  const auto& m = manifest.model;
  const int64_t width = m.num_heads * m.head_dim, kv_width = m.num_kv_heads * m.head_dim;
  const at::TensorOptions options = at::TensorOptions().dtype(dtype).device(device);
  std::unique_ptr<Decoder> d(new Decoder());
  try {
    // Everything is looked at before anything is moved.
    const Module backbone = submodule(module, "backbone");
    std::vector<Module> layers;
    for (const auto& layer : submodule(backbone, "layers").children()) layers.push_back(layer);
    expect(static_cast<int64_t>(layers.size()) == m.num_layers, "it has ", layers.size(), " layers, its manifest ",
           m.num_layers);
    const std::vector<std::pair<std::string, std::vector<int64_t>>> kinds = {
        {"input_norm", {m.hidden_size}},
        {"qkv.weight", {width + 2 * kv_width, m.hidden_size}},
        {"out.weight", {m.hidden_size, width}},
        {"post_norm", {m.hidden_size}},
        {"gate_up.weight", {2 * m.intermediate_size, m.hidden_size}},
        {"down.weight", {m.hidden_size, m.intermediate_size}}};
    for (const Module& layer : layers) {
      for (const auto& [path, shape] : kinds) expect_shape(tensor_at(layer, path), path, shape);
    }
    d->rotary_ = tensor_at(module, "rotary_table");
    expect(d->rotary_.dim() == 3 && d->rotary_.size(0) == 2 && d->rotary_.size(2) == m.head_dim / 2 &&
               d->rotary_.scalar_type() == at::kFloat,
           "rotary_table has shape ", d->rotary_.sizes(), ", expected [2, positions, ", m.head_dim / 2, "] in float32");
    expect(backbone.hasattr("eps") && backbone.attr("eps").isDouble(), "backbone has no eps");
    d->eps_ = backbone.attr("eps").toDouble();
    const int64_t speech_tokens = manifest.speech.vocab_size;
    const int64_t positions = tensor_at(module, "speech_pos_emb.weight").size(0);
    expect_shape(tensor_at(module, "speech_emb.weight"), "speech_emb.weight", {speech_tokens, m.hidden_size});
    expect_shape(tensor_at(module, "speech_head.weight"), "speech_head.weight", {speech_tokens, m.hidden_size});
    expect_shape(tensor_at(backbone, "norm"), "backbone.norm", {m.hidden_size});

    Tensor* const stacks[] = {&d->input_norm_, &d->qkv_, &d->out_, &d->post_norm_, &d->gate_up_, &d->down_};
    for (size_t i = 0; i < kinds.size(); ++i) *stacks[i] = stacked(layers, kinds[i].first, kinds[i].second, options);
    d->norm_ = moved(backbone, "norm", {m.hidden_size}, options);
    d->speech_emb_ = moved(module, "speech_emb.weight", {speech_tokens, m.hidden_size}, options);
    d->speech_pos_emb_ = moved(module, "speech_pos_emb.weight", {positions, m.hidden_size}, options);
    d->head_ = moved(module, "speech_head.weight", {speech_tokens, m.hidden_size}, options);
    d->rotary_.set_data(d->rotary_.to(device).contiguous());
  } catch (const Mismatch& mismatch) {
    why = mismatch.text;
    return nullptr;
  }
  for (const auto& head : manifest.alignment_heads) {
    d->probe_layers_.push_back(head.layer);
    d->probe_heads_.push_back(head.head);
  }
  return d;
}

int64_t Decoder::workspace(const Tensor& k_cache, int64_t rows, bool probes, StepFamily family) const {
  static const auto op =
      typed_operator<int64_t(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool, int64_t)>(
          "vivace::decode_step_workspace");
  return op.call(qkv_, down_, head_, k_cache, rows, probes, static_cast<int64_t>(family));
}

Tensor Decoder::step(const Tensor& tokens, const Tensor& positions, const Tensor& row_request, const Tensor& k_cache,
                     const Tensor& v_cache, const Tensor& cache_seqlens, const Tensor& cache_rows, const Tensor& workspace,
                     const std::optional<Tensor>& probes, StepFamily family) const {
  static const auto op = typed_operator<Tensor(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, const std::optional<Tensor>&, at::IntArrayRef,
      at::IntArrayRef, int64_t)>("vivace::decode_step");
  return op.call(tokens, positions, row_request, speech_emb_, speech_pos_emb_, input_norm_, qkv_, out_, post_norm_, gate_up_,
                 down_, norm_, head_, rotary_[0], rotary_[1], k_cache, v_cache, cache_seqlens, cache_rows, workspace, eps_,
                 probes, probes ? at::IntArrayRef(probe_layers_) : at::IntArrayRef(),
                 probes ? at::IntArrayRef(probe_heads_) : at::IntArrayRef(), static_cast<int64_t>(family));
}

}  // namespace vivace
