// What an exported model says about itself: extra/vivace.json inside the archive.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace vivace {

inline constexpr int64_t kManifestFormat = 1;    // the newest manifest this host reads
inline constexpr int64_t kOperatorsVersion = 1;  // the newest schema of torch.ops.vivace.* this host runs

struct Manifest {
  enum class Dtype { kFloat32, kFloat16, kBFloat16 };
  enum class Variant { kEnglish, kMultilingual };

  struct Source {
    std::string name;                    // the checkpoint's file name; empty for random weights
    std::string sha256;                  // of that file
    std::optional<int64_t> random_seed;  // set: the weights are random, the tokens noise
  };
  struct Model {
    int64_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
    double rms_norm_eps, rope_theta;
    int64_t max_positions;  // of RoPE
    int64_t parameters;
  };
  struct Text {
    int64_t vocab_size, start_token, stop_token, max_tokens;
  };
  struct Speech {
    int64_t vocab_size, start_token, stop_token;
    int64_t first_invalid_token;  // tokens from here on are not speech
    int64_t max_tokens;
  };
  struct Conditioning {
    int64_t speaker_embed_size;
    int64_t prompt_tokens;  // the longest prompt
    int64_t length;         // rows that encode_voice returns
    bool emotion;
  };
  struct AlignmentHead {
    int64_t layer, head;
  };
  struct Defaults {
    double temperature, top_p, min_p, repetition_penalty, cfg_weight, exaggeration;
  };

  int64_t format;
  std::string producer;
  int64_t operators;
  std::string torch;
  Dtype dtype;
  Variant variant;
  Source source;
  Model model;
  Text text;
  Speech speech;
  Conditioning conditioning;
  std::vector<AlignmentHead> alignment_heads;
  Defaults defaults;
  std::string digest;  // of the archive's records: 64 hexadecimal digits (archive.h)

  std::string json;  // the text it was parsed from, for `vivace info`
};

/// Throws FileError naming `file` and the JSON path: "t3.vivace: manifest: model.num_layers is \"30\", expected an integer".
/// A format or an operator schema newer than this host's is said to be "made by a newer vivace".
Manifest parse_manifest(std::string_view json, const std::string& file);

/// "bfloat16", "float16", "float32".
std::string_view to_string(Manifest::Dtype dtype) noexcept;
/// "english", "multilingual".
std::string_view to_string(Manifest::Variant variant) noexcept;

}  // namespace vivace
