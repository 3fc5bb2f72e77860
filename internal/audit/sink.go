package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// Stdout is the path of the sink that is the server's standard output.
const Stdout = "stdout"

// Settings are the settings of a sink.
type Settings struct {
	Name string
	Path string // a file, or Stdout
	// Mode is the mode of a file that the sink creates. It keeps that of an existing
	// file.
	Mode     fs.FileMode
	Enforced bool // nothing may be done that the sink does not take
}

// Sink takes lines. It is safe for concurrent use.
type Sink struct {
	settings Settings

	mu    sync.Mutex // guards all below
	out   io.Writer
	file  *os.File // out, if it is a file of the sink
	torn  bool     // what was written last is the beginning of a line
	lost  int      // lines that were lost since the last one that was written
	since time.Time
}

// gapLine returns the line that says how many lines are missing before it.
type gapLine func(lost int, since time.Time) ([]byte, error)

// Open opens a sink. stdout is the server's standard output.
func Open(settings Settings, stdout io.Writer) (*Sink, error) {
	s := &Sink{settings: settings, out: stdout}
	if settings.Path == Stdout {
		return s, nil
	}
	if err := s.open(); err != nil {
		return nil, err
	}
	return s, nil
}

// Name returns the name of the sink.
func (s *Sink) Name() string { return s.settings.Name }

// Enforced reports whether nothing may be done that the sink does not take.
func (s *Sink) Enforced() bool { return s.settings.Enforced }

// Close closes the sink's file.
func (s *Sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return nil
	}
	return s.wrap(s.file.Close())
}

// Reload opens the file again if another file, or none, has its path now, for example
// after logrotate renamed it. If it returns an error, the sink goes on with the old file.
func (s *Sink) Reload() (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return false, nil
	}
	named, err := os.Stat(s.settings.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, s.wrap(err)
	}
	if err == nil {
		opened, err := s.file.Stat()
		if err != nil || os.SameFile(named, opened) {
			return false, s.wrap(err)
		}
	}
	old := s.file
	if err := s.open(); err != nil {
		return false, err
	}
	return true, s.wrap(old.Close())
}

// open opens the sink's file. A line that a killed process left unfinished stays as it
// is, and the next line begins after it.
func (s *Sink) open() error {
	info, err := os.Stat(s.settings.Path)
	if err == nil && !info.Mode().IsRegular() && info.Mode()&fs.ModeCharDevice == 0 {
		return s.wrap(fmt.Errorf("%s is neither a file nor a character device", s.settings.Path)) // a pipe would block
	}
	file, err := openOrCreate(s.settings.Path, s.settings.Mode)
	if err != nil {
		return s.wrap(err)
	}
	torn, err := endsTorn(file)
	if err != nil {
		return s.wrap(errors.Join(err, file.Close()))
	}
	s.out, s.file, s.torn = file, file, torn
	return nil
}

// openOrCreate opens a file for appending. A new file gets exactly this mode, whatever
// the umask is.
func openOrCreate(path string, mode fs.FileMode) (*os.File, error) {
	const flags = os.O_RDWR | os.O_APPEND
	file, err := os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return os.OpenFile(path, flags, 0)
	}
	if err != nil {
		return nil, err
	}
	if err := file.Chmod(mode); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// endsTorn reports whether a file ends within a line.
func endsTorn(file *os.File) (bool, error) {
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false, err
	}
	var last [1]byte
	_, err = file.ReadAt(last[:], info.Size()-1)
	return last[0] != '\n', err
}

// write writes a line. If lines were lost before it, it first writes the line that gap
// returns, and returns how many were lost.
func (s *Sink) write(line []byte, gap gapLine) (lost int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	lost, err = s.put(line, gap)
	if err != nil {
		if s.lost == 0 {
			s.since = time.Now()
		}
		s.lost++
		return 0, err
	}
	return lost, nil
}

// recover returns nil if no line was lost since the last one that was written. Otherwise
// it tries to write the line that gap returns.
func (s *Sink) recover(gap gapLine) (lost int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost == 0 {
		return 0, nil
	}
	return s.put(nil, gap)
}

func (s *Sink) put(line []byte, gap gapLine) (lost int, err error) {
	lost = s.lost
	if lost > 0 {
		missing, err := gap(lost, s.since)
		if err != nil {
			return 0, s.wrap(err)
		}
		line = append(missing, line...)
	}
	if s.torn {
		line = append([]byte("\n"), line...)
	}
	// One call for all of it: lines of other processes do not end up inside.
	n, err := s.out.Write(line)
	if err != nil {
		if n > 0 && !s.takeBack(int64(n)) {
			s.torn = true
		}
		return 0, s.wrap(err)
	}
	s.torn, s.lost = false, 0
	return lost, nil
}

// takeBack removes the last n bytes, which are a part of a line. It reports whether they
// are gone. They stay if another process has written after them.
func (s *Sink) takeBack(n int64) bool {
	if s.file == nil {
		return false
	}
	end, err := s.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return false
	}
	info, err := s.file.Stat()
	return err == nil && info.Size() == end && s.file.Truncate(end-n) == nil
}

func (s *Sink) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("audit %q: %w", s.settings.Name, err)
}
