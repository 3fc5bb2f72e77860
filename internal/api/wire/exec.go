package wire

// ExecRequest is the body of a command that is run as a whole.
type ExecRequest struct {
	Command []string          `json:"command"`
	Timeout string            `json:"timeout,omitempty"` // such as "30s"; empty: 30 s
	Stdin   string            `json:"stdin,omitempty"`
	Env     map[string]string `json:"env,omitempty"` // added to the sandbox's
	Dir     string            `json:"dir,omitempty"` // absolute; empty: the sandbox's
	User    string            `json:"user,omitempty"`
	Task    string            `json:"task,omitempty"`
}

// ExecAnswer is the result of a command.
type ExecAnswer struct {
	ExitCode *int `json:"exit_code"` // 128 plus the signal that ended it; nil if TimedOut
	TimedOut bool `json:"timed_out"` // it was killed, because its time was over
	// Stdout and Stderr are empty if the output is not UTF-8. Then it is base64 in the other
	// field.
	Stdout       string `json:"stdout"`
	Stderr       string `json:"stderr"`
	StdoutBase64 []byte `json:"stdout_base64,omitempty"`
	StderrBase64 []byte `json:"stderr_base64,omitempty"`
	// Truncated are the outputs of which only the first MiB is here: "stdout", "stderr".
	Truncated []string `json:"truncated"`
}

// ExecInput is a message to a running command. It has at most one field; without any it
// shows that the caller is there.
type ExecInput struct {
	Stdin   *ExecData   `json:"stdin,omitempty"`
	TTYSize *WindowSize `json:"tty_size,omitempty"`
}

// ExecOutput is a message from a running command, with one field, or Exited and Result.
type ExecOutput struct {
	Stdout *ExecData   `json:"stdout,omitempty"`
	Stderr *ExecData   `json:"stderr,omitempty"`
	Exited bool        `json:"exited,omitempty"`
	Result *ExecResult `json:"result,omitempty"`
}

// ExecData is a piece of a stream, or its end.
type ExecData struct {
	Data  []byte `json:"data,omitempty"` // base64
	Close bool   `json:"close,omitempty"`
}

// WindowSize is the size of a terminal in characters.
type WindowSize struct {
	Height uint16 `json:"height"`
	Width  uint16 `json:"width"`
}

// ExecResult is how a command ended.
type ExecResult struct {
	ExitCode int    `json:"exit_code"`       // -1 if there is an Error
	Error    *Error `json:"error,omitempty"` // why there is no exit code
}
