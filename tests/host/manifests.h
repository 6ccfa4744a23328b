// A good manifest, as `vivace export` writes it.
#pragma once

#include <string>

namespace vivace::testing {

inline const std::string kManifestJson = R"({
 "format": 1, "kind": "t3", "producer": "vivace 0.1.0", "operators": 1, "torch": "2.11.0",
 "dtype": "bfloat16", "variant": "english",
 "source": {"name": "t3_cfg.safetensors", "sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
 "model": {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 30, "num_heads": 16, "num_kv_heads": 16,
           "head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0},
           "max_positions": 131072, "parameters": 532405248},
 "text": {"vocab_size": 704, "start_token": 255, "stop_token": 0, "max_tokens": 2048},
 "speech": {"vocab_size": 8194, "start_token": 6561, "stop_token": 6562, "first_invalid_token": 6561, "max_tokens": 4096},
 "conditioning": {"speaker_embed_size": 256, "prompt_tokens": 150, "length": 34, "emotion": true},
 "alignment_heads": [[12, 15], [13, 11], [9, 2]],
 "defaults": {"temperature": 0.8, "top_p": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "cfg_weight": 0.5,
              "exaggeration": 0.5},
 "digest": {"algorithm": "sha256", "records": "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"}
})";

}  // namespace vivace::testing
