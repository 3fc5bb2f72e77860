package api

import (
	"net/http"
)

func (a *API) adopt(w http.ResponseWriter, r *http.Request, _ query) error {
	fields, err := readFields(r, "instance")
	if err != nil {
		return err
	}
	if a.config.Operator == nil {
		return errNothingToDecide
	}
	answer, err := a.config.Operator.Adopt(r.Context(), fields["instance"])
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer)
}

func (a *API) forget(w http.ResponseWriter, r *http.Request, _ query) error {
	if _, err := readFields(r); err != nil {
		return err
	}
	if a.config.Operator == nil {
		return errNothingToDecide
	}
	answer, err := a.config.Operator.Forget(r.Context())
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer)
}

var errNothingToDecide = invalid("the server keeps its records in memory, so it has no identity to decide about")
