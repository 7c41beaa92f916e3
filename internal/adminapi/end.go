// This file ends connections: one, or all that a filter selects.

package adminapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// maxReason is the longest reason of a close frame in bytes (RFC 6455 §5.5).
const maxReason = frame.MaxControlPayload - 2

// defaultWindow is over how long the ends of many connections are spread: their
// clients come back.
const defaultWindow = 10 * time.Second

// end is DELETE /connections/{id}.
func (a *api) end(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "code", "reason")
	if err != nil {
		return err
	}
	e, err := ending(q)
	if err != nil {
		return refuse(http.StatusBadRequest, err)
	}
	c, err := a.get(r)
	if err != nil {
		return err
	}
	// One that ends already, for whatever reason, is what was asked for.
	c.Close(e)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// endAll is DELETE /connections.
func (a *api) endAll(w http.ResponseWriter, r *http.Request) error {
	q, f, err := filtered(r, "window", "code", "reason")
	if err != nil {
		return err
	}
	e, err := ending(q)
	if err != nil {
		return refuse(http.StatusBadRequest, err)
	}
	window := defaultWindow
	if v, ok := q["window"]; ok {
		if window, err = duration("window", v); err != nil {
			return refuse(http.StatusBadRequest, err)
		}
	}
	if !slices.ContainsFunc(filters, func(name string) bool { return q[name] != "" }) {
		return refuse(http.StatusBadRequest, errors.New("no filter: say which connections are to end"))
	}
	n := a.reg.EndSelected(f, window, e)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	return json.NewEncoder(w).Encode(struct {
		Matched int `json:"matched"`
	}{n})
}

// ending reads what clients are to be told.
func ending(q map[string]string) (registry.Ending, error) {
	e := registry.Ending{Reason: registry.Admin, Text: q["reason"]}
	if v, ok := q["code"]; ok {
		code, err := strconv.ParseUint(v, 10, 16)
		if err != nil || !frame.ValidCloseCode(uint16(code)) {
			return e, fmt.Errorf("code must be a close code that may be sent: %q", v)
		}
		e.Code = uint16(code)
	}
	if len(e.Text) > maxReason || !utf8.ValidString(e.Text) {
		return e, fmt.Errorf("reason must be UTF-8 of at most %d bytes", maxReason)
	}
	return e, nil
}
