#include "opencl/kernel.h"

#include <utility>

namespace portlm::opencl {

namespace {

constexpr size_t kMostOfLog = 2000;  // characters: the first error is what is wrong

std::string log_of(Program program, DeviceId device) {
  size_t size = 0;
  if (cl().GetProgramBuildInfo(program, device, kBuildLog, 0, nullptr, &size) != kDone || size == 0) return {};
  std::string log(size, '\0');
  if (cl().GetProgramBuildInfo(program, device, kBuildLog, size, log.data(), nullptr) != kDone) return {};
  log.resize(log.find_last_not_of(std::string(" \n\0", 3)) + 1);
  return log.size() > kMostOfLog ? log.substr(0, kMostOfLog) + " ..." : log;
}

}  // namespace

Kernel::Kernel(std::string name, std::string source) : name_(std::move(name)), source_(std::move(source)) {}

Kernel::~Kernel() {
  if (id_ != nullptr) cl().ReleaseKernel(id_);
  if (program_ != nullptr) cl().ReleaseProgram(program_);
}

KernelId Kernel::on(Device& device) {
  if (id_ != nullptr) return id_;
  Status status = kDone;
  if (program_ == nullptr) {
    const char* const text = source_.c_str();
    const size_t size = source_.size();
    const char* texts[] = {text};
    Program const program = cl().CreateProgramWithSource(device.context(), 1, texts, &size, &status);
    device.check(status, "taking the source of " + name_);
    DeviceId const id = device.id();
    status = cl().BuildProgram(program, 1, &id, "", nullptr, nullptr);
    if (status != kDone) {
      const std::string log = log_of(program, id);
      cl().ReleaseProgram(program);
      device.check(status, "compiling " + name_ + (log.empty() ? "" : ", of which its compiler says\n" + log + "\n"));
    }
    program_ = program;
  }
  KernelId const made = cl().CreateKernel(program_, name_.c_str(), &status);
  device.check(status, "making the kernel " + name_);
  return id_ = made;
}

size_t Kernel::most_threads(Device& device) {
  size_t most = 0;
  if (id_ != nullptr) cl().GetKernelWorkGroupInfo(id_, device.id(), kKernelThreads, sizeof most, &most, nullptr);
  return most;
}

}  // namespace portlm::opencl
