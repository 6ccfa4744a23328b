#include "host/model.h"

#include <ATen/ATen.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <array>
#include <string_view>

#include "host/archive.h"
#include "host/device.h"
#include "host/error.h"
#include "host/operators.h"

namespace vivace {
namespace {

/// The methods of the module, by their places in kMethods.
enum Method : size_t { kEncodeVoice, kEmbedPrompt, kNewCache, kForward, kLogits, kDecode };
constexpr std::array kMethods = {"encode_voice", "embed_prompt", "new_cache", "forward", "logits", "decode"};

at::ScalarType scalar_type(const std::string& name, Manifest::Dtype exported) {
  const std::string wanted = name == "auto" ? std::string(to_string(exported)) : name;
  if (wanted == "float32" || wanted == "fp32") return at::kFloat;
  if (wanted == "bfloat16" || wanted == "bf16") return at::kBFloat16;
  if (wanted == "float16" || wanted == "fp16") return at::kHalf;
  throw Error("vivace.model: dtype is " + printable(name) + ", expected auto, float32, bfloat16 or float16");
}

/// The profiling executor specialises to the shapes it sees and compiles again for each new prompt; the plain one
/// interprets. The switch is global, so it is set only while our methods' executors are made.
class PlainExecutor {
 public:
  PlainExecutor() : profiling_(torch::jit::getProfilingMode().exchange(false)), optimize_(false) {}
  ~PlainExecutor() { torch::jit::getProfilingMode() = profiling_; }

 private:
  bool profiling_;
  torch::jit::GraphOptimizerEnabledGuard optimize_;
};

}  // namespace

struct Model::Script {
  torch::jit::Module module;
  std::array<std::optional<torch::jit::Method>, kMethods.size()> methods;

  template <typename... Arguments>
  c10::IValue call(Method method, Arguments&&... arguments) {
    // The optimiser flag belongs to the thread, so it is set for each call.
    const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
    return (*methods[method])({c10::IValue(std::forward<Arguments>(arguments))...});
  }
};

Model::Model(const ModelOptions& options) : manifest_{}, device_(at::kCPU), script_(std::make_unique<Script>()) {
  manifest_ = options.verify ? verify_archive(options.path) : Archive::open(options.path).manifest();
  load_operators(options.operators);
  device_ = resolve_device(options.device);
  dtype_ = scalar_type(options.dtype, manifest_.dtype);

  const c10::InferenceMode inference;
  const PlainExecutor plain;
  try {
    // By way of host memory: what is converted or stacked leaves nothing behind on the device.
    script_->module = torch::jit::load(options.path, c10::Device(c10::kCPU));
  } catch (const std::exception& error) {  // ErrorReport is no c10::Error
    throw FileError(options.path, brief(error));
  }
  script_->module.eval();
  for (size_t i = 0; i < kMethods.size(); ++i) {
    script_->methods[i] = script_->module.find_method(kMethods[i]);
    if (!script_->methods[i]) throw FileError(options.path, "the archive's module has no method " + printable(kMethods[i]));
    auto* function = dynamic_cast<torch::jit::GraphFunction*>(&script_->methods[i]->function());
    if (function != nullptr) function->get_executor();
  }
  if (options.stacked) {
    decoder_ = Decoder::stack(script_->module, manifest_, device_, dtype_, not_stacked_);
  } else {
    not_stacked_ = "it was not asked for";
  }
  for (at::Tensor parameter : script_->module.parameters()) {
    if (parameter.is_floating_point() && parameter.scalar_type() != dtype_) parameter.set_data(parameter.to(dtype_));
    weight_bytes_ += static_cast<int64_t>(parameter.nbytes());
  }
  if (!device_.is_cpu()) script_->module.to(device_);
}

Model::~Model() = default;

int64_t Model::cache_bytes_per_position() const {
  const auto& model = manifest_.model;
  return 2 * model.num_layers * model.num_kv_heads * model.head_dim * static_cast<int64_t>(c10::elementSize(dtype_));
}

int64_t Model::cache_pitch(int64_t capacity) const {
  return decoder_ != nullptr && capacity % 256 == 0 ? capacity + 8 : capacity;
}

at::Tensor Model::encode_voice(const Voice& voice, float emotion) {
  const auto speaker = at::tensor(at::ArrayRef<float>(voice.speaker_emb)).unsqueeze(0).to(device_);
  const auto prompt = upload(voice.prompt_tokens, device_).unsqueeze(0);
  return script_->call(kEncodeVoice, speaker, prompt, static_cast<double>(emotion)).toTensor();
}

at::Tensor Model::embed_prompt(const at::Tensor& cond, const std::vector<int64_t>& text_tokens, bool drop_text) {
  const auto text = upload(text_tokens, device_);
  return script_->call(kEmbedPrompt, cond, text, drop_text).toTensor();
}

std::pair<at::Tensor, at::Tensor> Model::new_cache(int64_t rows, int64_t capacity) {
  if (decoder_ != nullptr) {
    const auto& m = manifest_.model;
    const auto one = [&] {
      return at::zeros({m.num_layers, rows, m.num_kv_heads, cache_pitch(capacity), m.head_dim},
                       at::TensorOptions().dtype(dtype_).device(device_))
          .narrow(3, 0, capacity)
          .transpose(2, 3);
    };
    return {one(), one()};
  }
  const auto caches = script_->call(kNewCache, rows, capacity).toTuple();
  return {caches->elements()[0].toTensor(), caches->elements()[1].toTensor()};
}

at::Tensor Model::forward(const at::Tensor& x, const at::Tensor& k_cache, const at::Tensor& v_cache,
                          const at::Tensor& cache_seqlens, const at::Tensor& cache_rows, const at::Tensor& cu_seqlens,
                          int64_t max_seqlen, const std::optional<at::Tensor>& probes) {
  return script_->call(kForward, x, k_cache, v_cache, cache_seqlens, cache_rows, cu_seqlens, max_seqlen, probes).toTensor();
}

at::Tensor Model::logits(const at::Tensor& hidden) { return script_->call(kLogits, hidden).toTensor(); }

at::Tensor Model::decode(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& row_request,
                         const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& cache_seqlens,
                         const at::Tensor& cache_rows, const std::optional<at::Tensor>& probes) {
  return script_->call(kDecode, tokens, positions, row_request, k_cache, v_cache, cache_seqlens, cache_rows, probes)
      .toTensor();
}

std::string brief(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  // TorchScript puts a traceback in front of what was thrown; the operators' own errors start with "vivace.".
  const size_t thrown = text.rfind("RuntimeError: ");
  size_t begin = thrown == std::string::npos ? 0 : thrown + std::string_view("RuntimeError: ").size();
  const size_t own = text.find("vivace.", begin);
  if (own != std::string::npos && text.find('\n', begin) > own) begin = own;
  while (begin < text.size() && text[begin] == '\n') ++begin;
  return text.substr(begin, text.find('\n', begin) - begin);
}

}  // namespace vivace
