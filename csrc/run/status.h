// How functions of this folder say that something failed: nothing here throws across the folder's border.
#pragma once

#include <string>
#include <utility>

namespace portlm::run {

// Whether it went well, and if not, why, in one line.
class Status {
 public:
  Status() = default;
  static Status failed(std::string message) {
    Status status;
    status.ok_ = false;
    status.message_ = std::move(message);
    return status;
  }
  bool ok() const { return ok_; }
  const std::string& message() const { return message_; }

 private:
  bool ok_ = true;
  std::string message_;
};

}  // namespace portlm::run
