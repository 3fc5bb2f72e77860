package credentials

import (
	"fmt"
	"io"
	"os"
)

// maxFile bounds a file, in bytes. The CAs of a whole operating system fit.
const maxFile = 1 << 20

// ReadFile returns the contents of a file of at most 1 MiB. Errors contain its path.
func ReadFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // only read
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return text, nil
}
