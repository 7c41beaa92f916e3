// This file shows and drains upstreams.

package adminapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// maxBody bounds the body of a request, in bytes.
const maxBody = 64 << 10

// upstreams is GET /connections/upstreams.
func (a *api) upstreams(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	return reply(w, a.reg.Upstreams())
}

// drained names upstreams.
type drained struct {
	Upstream string `json:"upstream"`
	Route    string `json:"route"`
}

// beginDrain is POST /connections/drain.
func (a *api) beginDrain(w http.ResponseWriter, r *http.Request) error {
	if _, err := query(r); err != nil {
		return err
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	var which drained
	if err := d.Decode(&which); err != nil {
		return refuse(http.StatusBadRequest, fmt.Errorf("reading body: %w", err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return refuse(http.StatusBadRequest, errors.New("reading body: surplus data after the object"))
	}
	n, err := a.setDrain(which, true)
	if err != nil {
		return err
	}
	return reply(w, struct {
		Connections int `json:"connections"`
	}{n})
}

// endDrain is DELETE /connections/drain.
func (a *api) endDrain(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "upstream", "route")
	if err != nil {
		return err
	}
	if _, err := a.setDrain(drained{q["upstream"], q["route"]}, false); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) setDrain(which drained, drain bool) (conns int, err error) {
	if which.Upstream == "" {
		return 0, refuse(http.StatusBadRequest, errors.New("upstream is missing"))
	}
	n, found := a.drain(which.Upstream, which.Route, drain)
	switch {
	case found:
		return n, nil
	case which.Route != "":
		return 0, refuse(http.StatusNotFound, fmt.Errorf("no upstream %q in route %q", which.Upstream, which.Route))
	default:
		return 0, refuse(http.StatusNotFound, fmt.Errorf("no upstream %q", which.Upstream))
	}
}
