// Runs a package that `atlas-blocks export` wrote, token by token, without Python.
//
//   run_step PACKAGE INPUT OUTPUT
//
// INPUT: torch.save of [tokens [B, T], the state's tensors]; OUTPUT, for
// torch.load(weights_only=False): the logits [B, T, V] and the state after token T.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int count, char** names) {
  if (count != 4) {
    std::cerr << "usage: run_step PACKAGE INPUT OUTPUT\n";
    return 2;
  }
  c10::InferenceMode inference;
  std::ifstream input(names[2], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(input)), {});
  const c10::IValue values = torch::pickle_load(bytes);
  std::vector<at::Tensor> state;
  for (const c10::IValue& value : values.toListRef()) {
    state.push_back(value.toTensor().contiguous());
  }
  at::Tensor tokens = state[0];

  torch::inductor::AOTIModelPackageLoader step(names[1]);
  std::vector<at::Tensor> logits;
  for (int64_t t = 0; t < tokens.size(1); ++t) {
    state[0] = tokens.slice(1, t, t + 1).contiguous();
    state = step.run(state);
    logits.push_back(state[0]);
  }
  state[0] = at::cat(logits, 1);
  bytes = torch::pickle_save(state);
  std::ofstream(names[3], std::ios::binary).write(bytes.data(), bytes.size());
}
