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

struct Built {
  Program program;  // nullptr if it does not compile
  Status status;
  std::string log;
};

Built build(Device& device, const std::string& source, const std::string& name) {
  Status status = kDone;
  const char* text = source.c_str();
  const size_t size = source.size();
  Program const program = cl().CreateProgramWithSource(device.context(), 1, &text, &size, &status);
  device.check(status, "taking the source of " + name);
  DeviceId const id = device.id();
  status = cl().BuildProgram(program, 1, &id, "", nullptr, nullptr);
  if (status == kDone) return {program, status, {}};
  Built failed{nullptr, status, log_of(program, id)};
  cl().ReleaseProgram(program);
  return failed;
}

}  // namespace

Whole::~Whole() {
  if (program_ != nullptr) cl().ReleaseProgram(program_);
}

Program Whole::on(Device& device) {
  if (!std::exchange(tried_, true)) program_ = build(device, source_, "a module").program;
  return program_;
}

Kernel::Kernel(std::string name, std::string symbol, std::string source, std::shared_ptr<Whole> whole)
    : name_(std::move(name)), symbol_(std::move(symbol)), source_(std::move(source)), whole_(std::move(whole)) {}

Kernel::~Kernel() {
  if (id_ != nullptr) cl().ReleaseKernel(id_);
  if (own_ != nullptr) cl().ReleaseProgram(own_);
}

KernelId Kernel::on(Device& device) {
  if (id_ != nullptr) return id_;
  Program program = whole_->on(device);
  if (program == nullptr) {
    if (own_ == nullptr) {
      const Built built = build(device, source_, name_);
      const std::string log = built.log.empty() ? "" : ", of which its compiler says\n" + built.log + "\n";
      device.check(built.status, "compiling " + name_ + log);
      own_ = built.program;
    }
    program = own_;
  }
  Status status = kDone;
  KernelId const made = cl().CreateKernel(program, symbol_.c_str(), &status);
  device.check(status, "making the kernel " + name_);
  return id_ = made;
}

size_t Kernel::most_threads(Device& device) {
  size_t most = 0;
  if (id_ != nullptr) cl().GetKernelWorkGroupInfo(id_, device.id(), kKernelThreads, sizeof most, &most, nullptr);
  return most;
}

}  // namespace portlm::opencl
