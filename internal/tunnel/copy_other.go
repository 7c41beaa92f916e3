//go:build !unix

package tunnel

import "errors"

const readsRaw = false

func readRaw(uintptr, []byte) (n int, again bool, err error) { return 0, false, errors.ErrUnsupported }
