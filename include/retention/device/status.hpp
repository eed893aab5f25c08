// What a host function says instead of throwing.

#pragma once

#include <string>
#include <utility>

namespace retention::device {

/// Success, or a message that names what was given and what is accepted.
class [[nodiscard]] Status {
 public:
  Status() = default;
  explicit Status(std::string message) : ok_(false), message_(std::move(message)) {}

  bool ok() const { return ok_; }
  explicit operator bool() const { return ok_; }
  std::string const& message() const { return message_; }  // empty for success

 private:
  bool ok_ = true;
  std::string message_;
};

}  // namespace retention::device
