//go:build !linux

package tunnel

import (
	"errors"
	"syscall"
	"time"
)

func setUserTimeout(_ syscall.Conn, d time.Duration) error {
	if d > 0 {
		return errors.ErrUnsupported
	}
	return nil
}

func hungUp(any) bool { return false }

func pendingError(any) error { return nil }
