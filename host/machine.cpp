#include "host/machine.h"

#include "host/device.h"
#include "host/model.h"
#include "host/operators.h"

namespace vivace {

Machine inspect_machine() {
  Machine machine;
  auto add = [&](c10::Device device) {
    machine.devices.push_back({device.str(), device_name(device), free_memory(device)});
  };
  add(c10::Device(c10::kCPU));
  try {
    load_operators();
    machine.operators = operators_build_info();
    if (!operators_have_cuda()) return machine;
    for (int i = 0; i < cuda_device_count(); ++i) add(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(i)));
  } catch (const std::exception& error) {
    machine.operators_error = brief(error);
  }
  return machine;
}

}  // namespace vivace
